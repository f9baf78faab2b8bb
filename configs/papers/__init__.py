"""Configs after papers: what a paper says, and our choice where it says nothing."""
