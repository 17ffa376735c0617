# Every verb is xtask's; make only spares the typing. `make` alone lists them.
VERBS := help setup cluster demo test bench proto lint tidy

.DEFAULT_GOAL := help
.PHONY: $(VERBS)

$(VERBS):
	@scripts/bootstrap.sh
	@cargo xtask $@ $(ARGS)
