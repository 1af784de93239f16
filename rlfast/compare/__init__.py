"""``rlfast compare``: a trainer stock beside the same trainer with rlfast's kernels, step by step or by function.

tiny.py        random models, a tokenizer and data that need no download
trainers.py    TRL's trainers on them, or on SmolLM2
steps.py       both arms in fresh processes, one step of each in turn
functions.py   a library's functions stock and patched: values, gradients, time; verl.py and openrlhf.py are the tables,
               openrlhf_code.py imports OpenRLHF where DeepSpeed or flash-attn is missing
report.py      what is printed
run.py         all of it, for the command line
"""
