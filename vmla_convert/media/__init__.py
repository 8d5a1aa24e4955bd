"""Text encoder and VAE, video files, and the clips that training and measuring use."""
