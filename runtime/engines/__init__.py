"""TensorRT engines of a bundle: which shapes they take, how they are built, and what their entry in the manifest says."""
