def on_transformers_import():
    pass
