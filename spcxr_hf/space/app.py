"""The Space: the demo of spcxr_hf, with checkpoints from the Hub; what is not there is left out of the page."""

from spcxr_hf.app.server import serve

NAMES = ["base", "lung-segmentation", "anatomy", "pneumonia", "screening"]

if __name__ == "__main__":
    # A Space says by GRADIO_SERVER_NAME and GRADIO_SERVER_PORT where to listen; elsewhere it is this machine alone.
    serve(models=[f"spcxr/{name}" for name in NAMES], host=None, port=None)
