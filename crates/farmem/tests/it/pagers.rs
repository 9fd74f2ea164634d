//! What the supervisor does with pagers, and above all when it must stop a program.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fake_pager::{Script, run_with_pager};
use crate::installation::{Installation, output, text};

fn run(script: Script, then: &str) -> Output {
    let installation = Installation::new();
    output(run_with_pager(&installation, &["--local", "64MiB"], script, then))
}

#[test]
fn a_pager_gets_the_limit_and_the_server_and_its_counts_are_reported() {
    let installation = Installation::new();
    let file = installation.folder().join("stats.json");
    let flags = ["--local", "64MiB", "--spill", "/tmp/..", "--stats", file.to_str().unwrap()];
    let output = output(run_with_pager(&installation, &flags, Script::Bye, "exit 6"));
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert!(text(&output.stdout).contains("welcome limit=67108864 server=unix:"), "{output:?}");
    assert!(text(&output.stdout).contains("spill=Some(\"/\")"), "{output:?}");
    let summary = "local peak 13 MiB of 64 MiB, external peak 5 MiB, 11 faults";
    assert!(text(&output.stderr).contains(summary), "{output:?}");
    let stats: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!((&stats["faults"], &stats["exit_status"]), (&11.into(), &6.into()));
    assert_eq!(stats["external_peak_bytes"], 5 << 20);
    assert_eq!(stats["processes"][0]["name"], "tested");
}

#[test]
fn a_program_whose_armed_pager_died_is_stopped_before_it_reads_a_wrong_byte() {
    let output = run(Script::Die, "exec cat /dev/zero > /dev/null");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("lost the pager of tested"), "{stderr}");
    assert!(stderr.contains("3 MiB of its memory"), "{stderr}");
}

#[test]
fn a_pager_that_dies_before_any_page_is_out_harms_nobody() {
    let output = run(Script::DieUnarmed, "exit 4");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
}

#[test]
fn what_a_pager_reports_as_fatal_is_told_and_stops_the_program() {
    let output = run(Script::Fatal, "exec cat /dev/zero > /dev/null");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let stderr = text(&output.stderr);
    let told = "farmem: lost memory server 192.0.2.1:7070 and with it region 7";
    assert_eq!(stderr.matches(told).count(), 1, "{stderr}");
    assert!(!stderr.contains("lost the pager"), "told twice: {stderr}");
}

#[test]
fn a_pager_of_another_build_is_refused_and_the_program_goes_on() {
    let output = run(Script::Foreign, "exit 3");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text(&output.stdout).contains("refused: farmem-pagerd speaks version"), "{output:?}");
    assert!(text(&output.stderr).contains("is not paged"), "{output:?}");
}

#[test]
fn a_pager_that_does_not_leave_is_ended_soon_after_its_program() {
    let began = Instant::now();
    let output = run(Script::Stuck, "exit 2");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// Starts a program whose pager stays and that prints its own and its parent's process id.
fn start_staying(
    installation: &Installation,
) -> (std::process::Child, Vec<Pid>, impl BufRead + use<>) {
    let then = "echo pids $$ $PPID; exec cat /dev/zero > /dev/null";
    let mut command = run_with_pager(installation, &["--local", "64MiB"], Script::Stay, then);
    let mut farmem = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(farmem.stdout.take().unwrap());
    loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0);
        if let Some(pids) = line.strip_prefix("pids ") {
            let pid = |word: &str| Pid::from_raw(word.parse().unwrap()).unwrap();
            return (farmem, pids.split_whitespace().map(pid).collect(), output);
        }
    }
}

#[test]
fn a_killed_program_is_reported_as_killed_and_nothing_else() {
    let installation = Installation::new();
    let (farmem, pids, _output) = start_staying(&installation);
    kill_process(pids[0], Signal::KILL).unwrap();
    let output = farmem.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    assert!(!text(&output.stderr).contains("lost"), "{output:?}");
}

#[test]
fn a_killed_supervisor_takes_program_and_pager_with_it() {
    let installation = Installation::new();
    let (mut farmem, pids, mut output) = start_staying(&installation);
    assert_eq!(Pid::from_child(&farmem), pids[1]);
    farmem.kill().unwrap();
    farmem.wait().unwrap();
    // All who could write have ended when the pipe is at its end.
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
}

#[test]
fn a_killed_private_server_stops_the_programs_that_have_memory_there() {
    let installation = Installation::new();
    let (farmem, pids, _output) = start_staying(&installation);
    let supervisor = pids[1].as_raw_pid();
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"));
    let server = children.unwrap().split_whitespace().find_map(|pid| {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        arguments.contains("--private").then(|| pid.parse().unwrap())
    });
    let began = Instant::now();
    kill_process(Pid::from_raw(server.unwrap()).unwrap(), Signal::KILL).unwrap();
    let output = farmem.wait_with_output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("lost memory server unix:"), "{stderr}");
    assert!(stderr.contains("region 7 of tested"), "{stderr}");
}
