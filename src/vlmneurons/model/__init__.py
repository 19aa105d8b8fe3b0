"""A transformers model whose MLP neurons have names, and how a question becomes its inputs."""
