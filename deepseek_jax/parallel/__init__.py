"""Where arrays live: meshes and shardings. The model knows nothing of them."""
