"""vLLM as an engine: `engine` asks from here, `server` starts and proves it, `worker` counts and edits inside it."""
