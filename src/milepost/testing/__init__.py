"""Test tools for projects that build on Milepost: a fork launcher, faulty storage, a conformance suite."""
