"""From images and captions to a cache of latents and embeddings, and from there to batches."""
