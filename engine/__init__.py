"""Sparse fine-tuning of language models: planner, methods, training, chat. Usable headless; never imports gradio."""
