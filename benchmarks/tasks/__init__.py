"""Tasks of the benchmarks: questions with a right and a wrong answer each, and what is made of them."""
