"""The demo in a browser (gradio)."""
