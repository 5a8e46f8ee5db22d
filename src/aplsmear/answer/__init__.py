"""One answer from several ensembles: healthy, other AML or APL."""
