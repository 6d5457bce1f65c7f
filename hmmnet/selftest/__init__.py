"""The kernel's own tests of HMM (tools/testing/selftests/mm, hmm-tests), written anew from what each checks, played on this machine.

39 tests, each on the private units of a dmirror machine and on the coherent ones: 78 cases, under today's rules and, as far as they are
about what there was then, under those of v25. They say what a program sees, so they hold for
any implementation; the recordings of `hmmnet play` say more, but of one kernel.

`case` has what a test may use, `anonymous`, `files`, `migration`, `snapshots`, `exclusive`, `processes` and `huge` are the tests,
`runner` plays them.
"""
