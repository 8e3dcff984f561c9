"""HTTP: OpenAI's completions for a model of gptlab's. Needs the extra ``serve``."""
