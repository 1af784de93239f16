"""Formulas: pure arithmetic, written once, run by Triton, by torch and by the C++ that is printed from them."""
