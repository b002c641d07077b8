"""TOSS: token-level data selection for safe LLM fine-tuning (ICLR 2026, arXiv 2603.01185)."""
