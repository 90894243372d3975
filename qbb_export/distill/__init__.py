"""What needs the model as a whole: the text it writes, its layers' inputs, and learning from the float model.

``run`` takes a PyTorch model and the matrices to quantise through the stages of a recipe; ``settings`` holds every
number that a recipe may set. Only these modules (and the readers of models) import torch.
"""
