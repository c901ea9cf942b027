"""The bundled model: a small Llama that was trained on `tasks`, so that its causes are known."""


def load_tiny(): ...
