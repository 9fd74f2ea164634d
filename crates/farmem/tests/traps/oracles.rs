//! The oracles: programs that know what every byte must be, under every deed and transport.

use crate::rig::{Outcome, Rig};
use crate::servers::Server;

/// Runs `stamp` on ten times what it may keep.
fn stamp(rig: &Rig, options: &[&str], deed: &[&str]) -> Option<Outcome> {
    let arguments = ["--mebibytes", "160", "--threads", "2", "--seconds", "3"];
    let options = [&["--local", "16MiB"], options].concat();
    let program = rig.workload("stamp")?;
    Some(rig.run(&options, &program, &[&arguments, deed].concat()))
}

/// R1: the deed is done for three seconds, every load checked.
fn deed_is_harmless(deed: &str) {
    if let Some(rig) = Rig::new()
        && let Some(outcome) = stamp(&rig, &[], &["--with", deed])
    {
        outcome.is_right();
    }
}

#[test]
fn u5_stamps_move_with_mremap() {
    deed_is_harmless("mremap");
}

#[test]
fn u7_stamps_are_dropped() {
    deed_is_harmless("dontneed");
}

#[test]
fn u37_stamps_are_freed() {
    deed_is_harmless("free");
}

#[test]
fn u8_stamps_are_unmapped() {
    deed_is_harmless("unmap");
}

#[test]
fn u34_stamps_are_protected() {
    deed_is_harmless("protect");
}

#[test]
fn u32_stamps_are_forked() {
    deed_is_harmless("fork");
}

#[test]
fn u36_stamps_beside_short_threads() {
    deed_is_harmless("threads");
}

#[test]
fn u16_stamps_go_through_pipes() {
    deed_is_harmless("syscalls");
}

#[test]
fn u18_stamps_are_interrupted() {
    deed_is_harmless("signals");
}

/// R1: everything at once but forking, which slows the rest down.
#[test]
fn u7_stamps_under_every_change_of_mappings() {
    deed_is_harmless("mremap,dontneed,free,unmap,protect,threads,syscalls,signals");
}

/// R1: everything at once.
#[test]
fn u32_stamps_under_every_deed() {
    deed_is_harmless("all");
}

/// R1: the same with the server behind TCP.
#[test]
fn stamps_cross_the_network() {
    let Some(rig) = Rig::new() else { return };
    let server = Server::start(&rig, "1GiB");
    if let Some(outcome) = stamp(&rig, &["--server", &server.address], &["--with", "all"]) {
        outcome.is_right();
        assert_eq!(server.show()["sessions"], 0);
    }
}

/// R1: a store between a page's copying and its leaving would be lost; none is.
#[test]
fn u11_no_increment_is_lost() {
    if let Some(rig) = Rig::new()
        && let Some(program) = rig.workload("counter")
    {
        let arguments = ["--mebibytes", "160", "--seconds", "3"];
        rig.run(&["--local", "32MiB"], &program, &arguments).is_right();
    }
}
