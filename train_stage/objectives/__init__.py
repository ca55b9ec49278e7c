"""MaPeT, PIM and MIM: layouts, permutations, loss."""
