"""One family of scorers a file. Only files of this folder may import torch; import them late."""
