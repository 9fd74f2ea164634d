//! The binary as its users meet it. Every test runs the real `farmem`; the preload library is an
//! empty one and the pager a role of this test binary that speaks the control protocol, so that
//! what the supervisor does can be seen without paging anything.

mod commands;
mod fake_pager;
mod installation;
mod pagers;
mod run;
