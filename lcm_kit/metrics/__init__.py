"""One file a metric. Images are pixels [N, 3, H, W] in [-1, 1], float32; what needs the embedded world says so."""
