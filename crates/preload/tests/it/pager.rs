//! The pager is loaded beside programs of all kinds, and both go on.

use std::process::{Child, Command, Stdio};

use crate::harness::{Caller, Run, artefacts, await_that, specimen};

/// The probe's work comes to the same sum in each round: 4 times 0 + 1 + ... + 1,999.
const RIGHT: &str = " sum 7996000 ";

/// Rounds of the probe as it reports them: all of them right, none of its memory unknown to it.
fn check_rounds(caller: &Caller, rounds: usize) {
    for round in 1..=rounds {
        let report = caller.await_text(&format!("round {round} "));
        assert!(report.contains(RIGHT) && report.contains(" foreign 0 "), "{report}");
    }
}

/// Starts a program that ends when its input does: `wait_with_output` closes it.
fn until_closed(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
fn python_with_a_gibibyte_and_the_pager_both_go_on() {
    let Some(run) = Run::new(400) else { return };
    let script = "
import sys
blocks = [bytes([i % 251]) * (1 << 20) for i in range(1024)]
words = {i: str(i) for i in range(300000)}
sys.stdin.read()
print(all(b[0] == b[-1] == i % 251 for i, b in enumerate(blocks)), words[299999])
";
    let mut command = run.command("python3");
    let program = until_closed(command.args(["-c", script]));
    let caller = run.accept();
    let started = caller.receive().unwrap();
    assert!(started.ends_with(&format!("limit {}", 400u64 << 20)), "{started}");
    check_rounds(&caller, 5);
    let output = program.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "True 299999\n");
    run.await_companions(0);
}

#[test]
fn the_break_is_the_programs_alone() {
    let Some(run) = Run::new(80) else { return };
    let mut command = run.specimen(&["grow", "100", "3000"]);
    let program = until_closed(&mut command);
    let caller = run.accept();
    check_rounds(&caller, 10);
    let output = program.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "grown 100 right true\n");
}

#[test]
fn the_pager_links_nothing_that_could_move_the_break() {
    let Some(artefacts) = artefacts() else { return };
    let Ok(symbols) = Command::new("nm").arg(&artefacts.probe).output() else {
        eprintln!("skipped: there is no nm here");
        return;
    };
    let symbols = String::from_utf8(symbols.stdout).unwrap();
    let names: Vec<_> = symbols.lines().filter_map(|line| line.rsplit(' ').next()).collect();
    assert!(names.contains(&"_dl_early_allocate"), "no symbols in {}", artefacts.probe.display());
    for breaking in ["brk", "__brk", "sbrk", "__sbrk", "__libc_malloc"] {
        assert!(!names.contains(&breaking), "{breaking} is linked");
    }
}

#[test]
fn a_program_whose_first_thread_has_ended_is_still_watched_and_paged() {
    let Some(run) = Run::new(80) else { return };
    let mut command = run.specimen(&["leader-exits", "100"]);
    let program = until_closed(&mut command);
    check_rounds(&run.accept(), 3);
    let output = program.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "grown 100 right true\n");
}

#[test]
fn a_daemon_that_closes_everything_is_watched_and_paged() {
    let Some(run) = Run::new(64) else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("said");
    run.output(&mut run.specimen(&["daemon", file.to_str().unwrap()]));
    check_rounds(&run.accept(), 3);
    let said = || std::fs::read_to_string(&file).is_ok_and(|said| said == "daemon right true");
    await_that("the daemon's word", said);
    run.await_companions(0);
}

#[test]
fn a_program_may_change_its_user() {
    let Some(run) = Run::new(64) else { return };
    // SAFETY: takes nothing.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root may change its user");
        return;
    }
    let mut command = run.specimen(&["setuid", "65534"]);
    let program = until_closed(&mut command);
    check_rounds(&run.accept(), 3);
    let output = program.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "setuid 0 true true\n");
}

#[test]
fn forked_children_get_a_pager_of_their_own() {
    let Some(run) = Run::new(64) else { return };
    let script = "
import os
def child():
    memory = bytearray(b'x') * (100 << 20)
    os._exit(0 if memory.count(b'x') == 100 << 20 else 1)
for _ in range(3):
    if os.fork() == 0:
        child()
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)))
";
    let program =
        run.command("python3").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let callers: Vec<_> = (0..3).map(|_| run.accept()).collect();
    let started: std::collections::HashSet<_> =
        callers.iter().map(|caller| caller.receive().unwrap()).collect();
    assert_eq!(started.len(), 3, "one pager for each child: {started:?}");
    let output = program.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "[0, 0, 0]\n");
    run.await_companions(0);
}

#[test]
fn a_panic_of_the_pager_is_told_and_ends_the_pager_alone() {
    let Some(run) = Run::new(64) else { return };
    let mut command = run.specimen(&["grow", "80", "500"]);
    let program = until_closed(command.stderr(Stdio::piped()));
    let caller = run.accept();
    check_rounds(&caller, 1);
    caller.send("panic");
    let told = caller.await_text("panic: ");
    assert!(told.contains("as the test asked") && told.contains("runtime_probe.rs"), "{told}");
    run.await_companions(0);
    let output = program.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "grown 80 right true\n");
}

#[test]
fn a_debugger_sees_one_thread_and_follows_the_program_to_its_end() {
    let Some(run) = Run::new(64) else { return };
    let program = specimen();
    let script = ["-ex", "set startup-with-shell off", "-ex", "catch syscall exit_group"];
    let steps = ["-ex", "run", "-ex", "info threads", "-ex", "continue", "--args"];
    let mut command = run.command("gdb");
    command.args(["-q", "-batch", "-nx"]).args(script).args(steps).arg(program);
    command.args(["grow", "80", "1500"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let Ok(debugger) = command.spawn() else {
        eprintln!("skipped: there is no gdb here");
        return;
    };
    check_rounds(&run.accept(), 2);
    let output = String::from_utf8(debugger.wait_with_output().unwrap().stdout).unwrap();
    assert!(
        output.contains("grown 80 right true") && output.contains("exited normally"),
        "{output}"
    );
    assert!(!output.contains("\n  2  "), "{output}");
}

#[test]
fn without_a_usable_pager_the_program_goes_on_and_the_supervisor_is_told() {
    let Some(artefacts) = artefacts() else { return };
    let preload = artefacts.preload.display().to_string();
    for (pager, step) in [
        ("/nowhere/farmem-pagerd", "open the pager (error 2)"),
        ("/proc/self/status", "load the pager, which is no static position-independent executable"),
        ("/bin/sh", "load the pager, which is no static"),
        (&preload, "load the pager, which is no static"),
    ] {
        let run = Run::with_pager(64, pager, artefacts);
        let mut command = run.specimen(&["grow", "80", "50"]);
        let program = until_closed(&mut command);
        let told = run.accept().receive().unwrap();
        assert!(told.starts_with(r#"{"type":"unpaged","program_pid":"#), "{told}");
        assert!(told.contains(step), "{pager}: {told}");
        let output = program.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "grown 80 right true\n");
    }
}
