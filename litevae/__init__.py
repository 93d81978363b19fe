"""LiteVAE: wavelet-based autoencoders for latent diffusion (arXiv 2405.14477). Needs neither Ray nor MLflow."""
