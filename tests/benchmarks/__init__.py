"""What an attribution costs, beside captum, inseq and the naive way, and whether scopes find known causes.

The benchmarks are run on demand, never by a plain `pytest`:

    pip install -e ".[benchmark]" && pip install --no-deps inseq treescope
    OMP_NUM_THREADS=1 pytest -o addopts= tests/benchmarks/bench_*.py --benchmark-json=costs.json
    python -m tests.benchmarks.report costs.json  # the table of docs/costs.md, and demos/cost.png

    python -m tests.benchmarks.by_hand [FOLDER]  # Semantic Scope beside the same gradient written by hand
    python -m tests.benchmarks.passes FOLDER --into docs/costs.md  # what a question costs in forward passes
    python -m tests.benchmarks.gpu --into FOLDER  # where there is a GPU; at most 8 minutes
    python -m tests.benchmarks.throughput FOLDER  # prompts a second in batches, beside captum and inseq
    python -m tests.benchmarks.precision FOLDER --into docs/costs.md  # bfloat16 and float16 against float32
    python -m tests.benchmarks.known_causes_table --into docs/evidence.md  # takes some twenty minutes
    python -m tests.benchmarks.known_causes_table --model FOLDER --also tests.benchmarks.rules_table:METHODS
    python -m tests.benchmarks.answers FOLDER --into docs/answers.md  # 1, 8 and 32 tokens; some fifteen minutes
    python -m tests.benchmarks.circuits_table FOLDER --rules linear  # carried parts and patching, for docs/circuits.md
    python -m tests.benchmarks.fisher  # how far off Fisher Scope's estimate is
    python -m tests.benchmarks.corrections  # which corrections for sinks help; with --sink 0.15 under one made by hand

What these commands print into the documentation is kept there alone. The notebooks show what others store in
`tests/data`: `cases_table`, `open_checks`, `series_table` and `translation_table`, each with its command at its top.

`bench_cost.py` alone gives the table of costs, `bench_growth.py` the picture; `-k "Semantic or captum"` picks rows.

inseq is installed without its dependencies: it pins typeguard<=2.13.3, which it never imports, and TransformerLens
needs typeguard>=4.2. Rows whose library is missing are skipped. `-o addopts=` leaves out the run-time type checks.

Every cost is a ratio to a bare forward pass of the same Hugging Face model on the same tokens, measured just before
and just after each round, in CPU time of the process, so that it does not matter what else the machine does. No test
depends on a time.
"""
