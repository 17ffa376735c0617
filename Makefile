# Every verb is xtask's; make only spares the typing. `make` alone lists them.
VERBS := help setup cluster envoy demo test bench fuzz-policy fuzz-packets fuzz-l7 mutants proto lint tidy

# What cargo installs (bpf-linker) is found even where nobody has put this folder into PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: $(VERBS)

$(VERBS):
	@scripts/bootstrap.sh
	@cargo xtask $@ $(ARGS)
