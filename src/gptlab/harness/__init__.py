"""EleutherAI's lm-evaluation-harness on gptlab's models: ``python -m gptlab.harness --model gptlab ...``."""
