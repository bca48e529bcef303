"""Many runs: studies, searches, multiruns and sweep files."""
