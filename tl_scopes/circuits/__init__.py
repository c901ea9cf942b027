"""Where in the network a token's influence runs: paths, features, maps, pairs of prompts, agreement with patching."""
