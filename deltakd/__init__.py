"""Delta Knowledge Distillation of language models (arXiv 2509.14526)."""
