//! The binary as its users meet it. Every test runs the real `farmem`; the preload library is an
//! empty one and the pager a role of this test binary that speaks the control protocol, so that
//! what the supervisor does can be seen without paging anything.

#![expect(clippy::print_stdout, reason = "the fake pager tells the test what it saw")]
#![expect(clippy::zombie_processes, reason = "a test that fails may leave a process behind")]

mod commands;
mod fake_pager;
mod installation;
mod pagers;
mod run;
