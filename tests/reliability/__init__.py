"""Nothing lost, nothing wrong loaded: a seeded campaign of kills, damage, races and misuse.

`python tests/reliability --seed 1 --kills 100 --damages 1000 --settings 10000
--combinations 200` runs it at full size and prints what was tried, what held and what failed;
tests/test_reliability.py runs it small."""
