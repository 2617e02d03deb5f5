"""Model families: each file spells one architecture out of the shared layers."""
