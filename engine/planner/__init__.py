"""What a run will need, before it starts: the shape of a model, a closed form per memory term, the plan. Torch-free."""
