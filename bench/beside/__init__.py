"""`python -m bench peers`: the same weights, pictures and questions given to other programs and to ours, turn by turn."""
