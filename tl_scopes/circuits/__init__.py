"""Where in the network the influence of a token runs: paths, maps, pairs of prompts, agreement with patching."""
