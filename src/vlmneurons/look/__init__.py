"""What a person looks at: plots, reports and pages of neurons."""
