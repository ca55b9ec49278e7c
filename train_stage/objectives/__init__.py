"""The objectives MaPeT, PIM and MIM: layouts, permutations and the loss."""
