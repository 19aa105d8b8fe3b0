"""What is asked: questions, their pictures, sets of questions, and tables of any source that become one."""
