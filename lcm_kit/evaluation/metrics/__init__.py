"""One file a metric. Images are pixels [N, 3, H, W] in [-1, 1], float32."""
