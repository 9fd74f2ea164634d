//! `farmem run` where nothing is paged: statuses, signals, what it says and what it leaves.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::installation::{Installation, output, text};

fn run(arguments: &[&str]) -> (Option<i32>, Option<i32>, String, String) {
    run_in(&Installation::new(), arguments)
}

fn run_in(
    installation: &Installation,
    arguments: &[&str],
) -> (Option<i32>, Option<i32>, String, String) {
    let output = output(installation.farmem(["run"].iter().chain(arguments)));
    let (stdout, stderr) = (text(&output.stdout).to_owned(), text(&output.stderr).to_owned());
    (output.status.code(), output.status.signal(), stdout, stderr)
}

#[test]
fn the_exit_status_is_the_programs() {
    let installation = Installation::new();
    for status in [0, 1, 7, 125, 255] {
        let script = format!("exit {status}");
        let (code, ..) = run_in(&installation, &["--", "sh", "-c", &script]);
        assert_eq!(code, Some(status));
    }
}

#[test]
fn farmem_dies_of_the_signal_that_the_program_died_of() {
    let installation = Installation::new();
    for (name, number) in [("KILL", 9), ("TERM", 15), ("INT", 2), ("SEGV", 11), ("USR1", 10)] {
        let script = format!("kill -{name} $$");
        let (_, signal, ..) = run_in(&installation, &["--", "sh", "-c", &script]);
        assert_eq!(signal, Some(number), "{name}");
    }
}

#[test]
fn own_failures_are_told_apart_from_the_programs() {
    let installation = Installation::new();
    let plain = installation.folder().join("plain");
    fs::write(&plain, "").unwrap();
    let plain = plain.to_str().unwrap();
    for (arguments, status, reason) in [
        (&["--no-such-flag", "true"][..], 125, "--no-such-flag"),
        (&["--local", "1MiB", "true"], 125, "the least is 16 MiB"),
        (&["--local", "4X", "true"], 125, "no unit"),
        (&["--server", "nowhere", "true"], 125, "HOST:PORT"),
        (&["--server", "127.0.0.1:1", "true"], 125, "127.0.0.1:1 does not serve"),
        (&["--stats", "/no/such/folder/s", "true"], 125, "/no/such/folder/s"),
        (&["--spill", "/no/such/folder", "true"], 125, "--spill /no/such/folder"),
        (&["--spill", plain, "true"], 125, "no such directory"),
        (&[], 125, "PROGRAM"),
        (&[plain], 126, "Permission denied"),
        (&["/"], 126, "Permission denied"),
        (&["no-such-program"], 127, "no-such-program"),
        (&["/no/such/program"], 127, "/no/such/program"),
    ] {
        let (code, _, _, stderr) = run_in(&installation, arguments);
        assert_eq!(code, Some(status), "{arguments:?}: {stderr}");
        assert!(stderr.contains(reason), "{arguments:?}: {stderr}");
    }
}

#[test]
fn own_failures_are_told_apart_wherever_run_stands_on_the_line() {
    let installation = Installation::new();
    let file = installation.folder().join("farmem.toml");
    let file = file.to_str().unwrap();
    for (content, more, reason) in [
        (Some("[run]\nlocal = '64MiB'\n"), &["--bogus", "true"][..], "--bogus"),
        (Some("[run]\nlokal = '64MiB'\n"), &["true"], "[run] lokal"),
        (None, &["true"], "cannot read"),
    ] {
        match content {
            Some(content) => fs::write(file, content).unwrap(),
            None => fs::remove_file(file).unwrap(),
        }
        let arguments = [&["--config", file, "run"], more].concat();
        let output = output(installation.farmem(&arguments));
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{output:?}");
    }
}

#[test]
fn a_private_server_is_no_server_of_the_operators() {
    let installation = Installation::new();
    let file = installation.folder().join("farmem.toml");
    fs::write(&file, "[serve]\nallow-dir = '/nowhere'\n").unwrap();
    for variable in [
        ("FARMEM_ALLOW_DIR", "/nowhere"),
        ("FARMEM_TIER", "tape=1G"),
        ("FARMEM_CONFIG", file.to_str().unwrap()),
    ] {
        let mut command = installation.farmem(["run", "true"]);
        command.envs([variable]);
        let output = output(command);
        assert_eq!(output.status.code(), Some(0), "{variable:?}: {output:?}");
    }
}

/// It says nothing for three seconds, though the kernel has taken the connection for it.
#[test]
fn a_server_that_says_nothing_is_refused_before_the_program_starts() {
    let installation = Installation::new();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let started = installation.folder().join("started");
    let (code, _, _, stderr) =
        run_in(&installation, &["--server", &address, "touch", started.to_str().unwrap()]);
    assert_eq!(code, Some(125), "{stderr}");
    assert!(stderr.contains(&format!("{address} does not serve")), "{stderr}");
    assert!(!started.exists());
}

#[test]
fn without_its_parts_it_refuses_and_says_what_to_do() {
    let installation = Installation::new();
    fs::remove_file(installation.folder().join("libfarmem_preload.so")).unwrap();
    let (code, _, _, stderr) = run_in(&installation, &["true"]);
    assert_eq!(code, Some(125));
    assert!(stderr.contains("libfarmem_preload.so") && stderr.contains("build"), "{stderr}");

    let installation = Installation::new();
    fs::copy("/bin/sh", installation.folder().join("farmem-pagerd")).unwrap();
    let (code, _, _, stderr) = run_in(&installation, &["true"]);
    assert_eq!(code, Some(125));
    assert!(stderr.contains("not a static executable"), "{stderr}");
}

#[test]
fn the_program_gets_its_arguments_streams_and_variables() {
    let (code, _, stdout, _) = run(&[
        "--local",
        "64MiB",
        "--",
        "sh",
        "-c",
        "echo \"$0 $1\"; echo \"$LD_PRELOAD\"; echo $FARMEM_RUN",
        "a",
        "--b",
    ]);
    assert_eq!(code, Some(0));
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[0], "a --b");
    assert!(lines[1].ends_with("/libfarmem_preload.so"), "{stdout}");
    let variable: Vec<&str> = lines[2].splitn(4, ':').collect();
    assert_eq!((variable[0], variable[2]), ("v1", "67108864"));
    assert!(variable[1].starts_with("farmem-") && variable[1].len() == "farmem-".len() + 32);
    assert!(variable[3].ends_with("/farmem-pagerd"));
}

#[test]
fn the_summary_is_one_line_and_quiet_is_quiet() {
    let (_, _, stdout, stderr) = run(&["--local", "64MiB", "true"]);
    assert_eq!(stdout, "");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("farmem: local peak "), "{stderr}");
    assert!(stderr.ends_with("of 64 MiB, nothing went out\n"), "{stderr}");
    let (_, _, _, stderr) = run(&["--quiet", "true"]);
    assert_eq!(stderr, "");
}

#[test]
fn the_stats_file_is_written_even_when_the_program_is_killed() {
    let installation = Installation::new();
    let file = installation.folder().join("stats.json");
    let name = file.to_str().unwrap();
    let script = "kill -9 $$";
    run_in(&installation, &["--local", "64MiB", "--stats", name, "--", "sh", "-c", script]);
    let stats: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(stats["exit_status"], 137);
    assert_eq!(stats["local_limit_bytes"], 64 << 20);
    assert!(stats["local_peak_bytes"].as_u64().unwrap() > 0);
    assert!(stats["wall_seconds"].as_f64().unwrap() > 0.0);
}

/// A pipe whose writers wait, or get an error, as nobody has read what is in it; its reader.
fn full_pipe(blocks: bool) -> (std::io::PipeReader, std::io::PipeWriter) {
    use rustix::fs::{OFlags, fcntl_setfl};
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while std::io::Write::write(&mut writer, &[b'.'; 4096]).is_ok() {}
    if blocks {
        fcntl_setfl(&writer, OFlags::empty()).unwrap();
    }
    (reader, writer)
}

/// The program has nothing to do with what becomes of farmem's messages.
#[test]
fn a_standard_error_that_takes_nothing_harms_nobody() {
    let installation = Installation::new();
    let file = installation.folder().join("stats.json");
    let static_program = installation.compile(
        "static",
        "-static",
        "void _start(void) { __asm__(\"mov $60, %eax; mov $7, %edi; syscall\"); }",
    );
    for (name, pipe) in
        [("closed", None), ("full", Some(full_pipe(true))), ("error", Some(full_pipe(false)))]
    {
        let (_reader, writer) = pipe.map_or_else(
            || (None, std::io::pipe().unwrap().1),
            |(reader, writer)| (Some(reader), writer),
        );
        let mut command = installation.farmem(["run", "--stats", file.to_str().unwrap()]);
        let mut farmem = command.arg(&static_program).stderr(writer).spawn().unwrap();
        let ended = ends_within(Pid::from_child(&farmem), 200);
        let _ = farmem.kill();
        assert_eq!((ended, farmem.wait().unwrap().code()), (true, Some(7)), "{name}");
        let stats: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(stats["exit_status"], 7, "{name}");
        fs::remove_file(&file).unwrap();
    }
}

#[test]
fn the_stats_file_has_every_key_at_its_top_whether_or_not_anything_was_paged() {
    let installation = Installation::new();
    let file = installation.folder().join("stats.json");
    let arguments = ["--local", "64MiB", "--stats", file.to_str().unwrap(), "true"];
    assert_eq!(run_in(&installation, &arguments).0, Some(0));
    let stats: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    for key in [
        "local_limit_bytes",
        "local_peak_bytes",
        "external_peak_bytes",
        "faults",
        "fetched_pages",
        "readahead_pages",
        "readahead_hits",
        "evicted_pages",
        "written_pages",
        "victim_hits",
        "zero_pages",
        "fault_p50_us",
        "fault_p99_us",
        "wall_seconds",
        "exit_status",
    ] {
        assert!(stats[key].is_number(), "{key}: {stats}");
    }
}

/// What a command shows on a terminal, and its status.
fn on_a_terminal(installation: &Installation, arguments: &str) -> (String, Option<i32>) {
    let mut command = Command::new("script");
    let line = format!("{}/farmem {arguments}", installation.folder().display());
    command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::null());
    command.env("TMPDIR", installation.folder());
    let output = output(command);
    (text(&output.stdout).to_owned(), output.status.code())
}

#[test]
fn progress_is_a_live_line_on_a_terminal_and_nothing_elsewhere() {
    let installation = Installation::new();
    let (shown, code) =
        on_a_terminal(&installation, "run --progress --local 64MiB -- sh -c 'sleep 0.7; exit 3'");
    assert_eq!(code, Some(3));
    let (live, end) = shown.split_once("nothing went out").unwrap();
    assert!(
        live.starts_with("\r\x1b[Kfarmem: local ") && live.contains(" of 64 MiB, "),
        "{shown:?}"
    );
    // It makes room for the summary.
    assert!(end.contains("\r\x1b[Kfarmem: local peak "), "{shown:?}");
    let (shown, _) = on_a_terminal(&installation, "run --local 64MiB -- sleep 0.7");
    assert!(!shown.contains('\x1b'), "{shown:?}");
    let (_, _, _, stderr) = run_in(&installation, &["--progress", "sleep", "0.7"]);
    assert!(!stderr.contains('\x1b'), "{stderr:?}");
}

#[test]
fn flags_may_come_from_the_environment_and_the_command_line_wins() {
    let installation = Installation::new();
    let limit = |arguments: &[&str]| {
        let mut command = installation.farmem(arguments);
        command.env("FARMEM_LOCAL", "32MiB").env("FARMEM_QUIET", "1");
        text(&output(command).stdout).split(':').nth(2).unwrap().to_owned()
    };
    assert_eq!(limit(&["run", "sh", "-c", "echo $FARMEM_RUN"]), (32 << 20).to_string());
    let flag = ["run", "--local", "64MiB", "sh", "-c", "echo $FARMEM_RUN"];
    assert_eq!(limit(&flag), (64 << 20).to_string());
}

#[test]
fn what_the_preload_library_cannot_enter_runs_unpaged_and_is_told() {
    let installation = Installation::new();
    let text = "void _start(void) { __asm__(\"mov $60, %eax; mov $3, %edi; syscall\"); }";
    let program = installation.compile("static", "-static", text);
    let (code, _, _, stderr) = run_in(&installation, &[program.to_str().unwrap()]);
    assert_eq!(code, Some(3));
    assert!(stderr.contains("runs without paging: it is a static executable"), "{stderr}");
    // By another name, through the search path.
    let link = installation.link(&program, "linked");
    let mut command = installation.farmem(["run", "linked"]);
    command.env("PATH", link.parent().unwrap());
    let output = output(command);
    assert!(crate::installation::text(&output.stderr).contains("without paging"));
}

/// A program that has said that it is there.
struct Running {
    farmem: Child,
    output: BufReader<std::process::ChildStdout>,
    /// What the program said after `ready`.
    words: Vec<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut farmem = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut output = BufReader::new(farmem.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let mut words = line.split_whitespace().map(str::to_owned);
        assert_eq!(words.next().as_deref(), Some("ready"));
        Self { farmem, output, words: words.collect() }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.farmem), signal).unwrap();
    }

    /// Returns when everybody who could write to the output has ended.
    fn wait_silence(&mut self) -> String {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        rest
    }
}

#[test]
fn signals_to_the_supervisor_alone_reach_the_program() {
    let installation = Installation::new();
    for (name, signal) in [
        ("TERM", Signal::TERM),
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
        ("WINCH", Signal::WINCH),
    ] {
        let script = format!("trap 'exit 9' {name}; echo ready; while :; do :; done");
        let mut running = Running::start(installation.farmem(["run", "sh", "-c", &script]));
        running.signal(signal);
        assert_eq!(running.farmem.wait().unwrap().code(), Some(9), "{name}");
    }
}

#[test]
fn a_program_that_ignores_hangups_still_does() {
    let installation = Installation::new();
    let farmem = installation.folder().join("farmem");
    let mut command = Command::new("sh");
    let script = "trap '' HUP; exec \"$0\" run -q sh -c 'kill -HUP $$; exit 4'";
    command.args(["-c", script]).arg(farmem).stdin(Stdio::null());
    assert_eq!(output(command).status.code(), Some(4));
}

/// What a shell script makes of farmem in its first argument, for ten seconds at most.
fn scripted(script: &str) -> Output {
    let installation = Installation::new();
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "10", "sh", "-c", script]);
    command.arg(installation.folder().join("farmem"));
    command.env("TMPDIR", installation.folder()).stdin(Stdio::null());
    output(command)
}

/// Then the kernel keeps no child that has ended for whoever waits for it.
#[test]
fn who_ignores_the_end_of_children_is_told_of_the_programs() {
    let output =
        scripted("exec perl -e '$SIG{CHLD} = \"IGNORE\"; exec @ARGV' \"$0\" run -q sh -c 'exit 4'");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
}

/// Signals that are ignored, and descriptors that are closed: some programs look.
#[test]
fn the_program_inherits_what_the_runtime_changes() {
    for script in [
        "trap '' PIPE; exec $RUN grep SigIgn /proc/self/status",
        "exec perl -e '$SIG{CHLD} = \"IGNORE\"; exec @ARGV' $RUN grep SigIgn /proc/self/status",
        "exec $RUN grep SigIgn /proc/self/status",
        "exec $RUN sh -c 'for n in 0 1 2; do test -e /proc/$$/fd/$n || exit 1$n; done'",
        "exec $RUN sh -c 'for n in 0 1 2; do test -e /proc/$$/fd/$n || exit 1$n; done' <&-",
        "exec $RUN sh -c 'for n in 0 1 2; do test -e /proc/$$/fd/$n || exit 1$n; done' >&-",
        "exec $RUN sh -c 'for n in 0 1 2; do test -e /proc/$$/fd/$n || exit 1$n; done' 2>&-",
    ] {
        let native = scripted(&script.replace("$RUN", "env"));
        let under = scripted(&script.replace("$RUN", "\"$0\" run -q"));
        assert_eq!(
            (under.status.code(), text(&under.stdout)),
            (native.status.code(), text(&native.stdout)),
            "{script}: {under:?}"
        );
    }
}

/// Who leads a session is told alone that its terminal is gone.
#[test]
fn a_hangup_of_the_terminal_reaches_the_program_of_a_session_leader() {
    let installation = Installation::new();
    let file = installation.folder().join("told");
    let farmem = installation.folder().join("farmem");
    let program = format!("trap 'echo hangup > {}; exit 9' HUP; echo ready", file.display());
    let line = format!(
        "exec {} run -q sh -c \"{program}; while :; do sleep 0.01; done\"",
        farmem.display()
    );
    let mut command = Command::new("script");
    command.args(["-qfec", &line, "/dev/null"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut terminal = command.env("TMPDIR", installation.folder()).spawn().unwrap();
    let mut shown = String::new();
    BufReader::new(terminal.stdout.take().unwrap()).read_line(&mut shown).unwrap();
    assert_eq!(shown.trim_end(), "ready");
    let session = fs::read_to_string(format!("/proc/{0}/task/{0}/children", terminal.id()));
    let leader = Pid::from_raw(session.unwrap().trim().parse().unwrap()).unwrap();
    terminal.kill().unwrap();
    terminal.wait().unwrap();
    let ended = ends_within(leader, 100);
    let _ = kill_process(leader, Signal::KILL);
    assert!(ended, "farmem lives on");
    assert_eq!(fs::read_to_string(file).unwrap(), "hangup\n");
}

/// Natively the program would get them: it is the process that was started.
#[test]
fn all_other_signals_to_the_supervisor_reach_the_program_too() {
    let installation = Installation::new();
    for number in [3, 5, 6, 7, 8, 11, 13, 14, 16, 23, 24, 25, 26, 27, 29, 30, 31, 34, 40, 64] {
        let script = format!("trap 'exit 9' {number}; echo ready; while :; do sleep 0.01; done");
        let mut running = Running::start(installation.farmem(["run", "bash", "-c", &script]));
        let pid = running.farmem.id().to_string();
        let sent = Command::new("bash").args(["-c", &format!("kill -{number} {pid}")]).status();
        assert!(sent.unwrap().success());
        assert_eq!(running.farmem.wait().unwrap().code(), Some(9), "{number}");
    }
}

/// A timer goes on over exec.
#[test]
fn a_timer_that_was_set_before_reaches_the_program() {
    let script = "exec perl -e 'alarm 1; exec @ARGV' \"$0\" run -q \
                  bash -c \"trap 'exit 9' ALRM; while :; do sleep 0.01; done\"";
    assert_eq!(scripted(script).status.code(), Some(9));
}

/// A real-time signal is not lost where it is pending already.
#[test]
fn queued_signals_are_all_passed_on() {
    let program = "import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
print('ready', flush=True)
for _ in range(3):
    info = signal.sigwaitinfo([40])
    print(info.si_code, flush=True)";
    let installation = Installation::new();
    let mut running = Running::start(installation.farmem(["run", "-q", "python3", "-c", program]));
    for value in [5, 6, 7] {
        let sent = Command::new("kill")
            .args(["-40", "-q", &value.to_string(), &running.farmem.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }
    assert_eq!(running.wait_silence(), "-1\n-1\n-1\n");
    assert_eq!(running.farmem.wait().unwrap().code(), Some(0));
}

#[test]
fn killing_the_supervisor_kills_the_program_and_the_private_server() {
    let installation = Installation::new();
    let script = "echo ready $PPID; exec cat";
    let mut command = installation.farmem(["run", "sh", "-c", script]);
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    let server = private_server_of(&running.words[0]);
    running.signal(Signal::KILL);
    assert_eq!(running.wait_silence(), "");
    running.farmem.wait().unwrap();
    await_end(server);
    // Nothing but the installation's own files is left.
    let rest = fs::read_dir(installation.folder()).unwrap().flatten();
    let folders = rest.filter(|entry| entry.file_type().unwrap().is_dir());
    assert_eq!(folders.count(), 0);
}

/// Whoever stops a session or a control group sends a signal to each of its processes. The program may be
/// in the middle of its own orderly end, and needs what it has out.
#[test]
fn a_private_server_outlives_all_signals_that_its_supervisor_outlives() {
    let installation = Installation::new();
    let mut command = installation.farmem(["run", "sh", "-c", "echo ready $PPID; exec cat"]);
    let (input, end) = std::io::pipe().unwrap();
    command.stdin(input);
    let mut running = Running::start(command);
    let server = private_server_of(&running.words[0]);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2]
    {
        kill_process(server, signal).unwrap();
        assert!(!ends_within(server, 1), "{signal:?}");
    }
    drop(end);
    assert_eq!(running.farmem.wait().unwrap().code(), Some(0));
    await_end(server);
}

/// Pagers of real-time priority and a busy machine leave little to others, and all that is moved out
/// waits for the server.
#[test]
fn a_private_server_comes_before_other_programs_where_that_is_permitted() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may raise priorities");
        return;
    }
    let installation = Installation::new();
    let mut command = installation.farmem(["run", "sh", "-c", "echo ready $PPID; exec cat"]);
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    let server = private_server_of(&running.words[0]);
    let began = Instant::now();
    while nice_of(server) != -10 {
        assert!(began.elapsed() < Duration::from_secs(30), "its nice value: {}", nice_of(server));
        std::thread::sleep(Duration::from_millis(5));
    }
    running.signal(Signal::TERM);
    running.farmem.wait().unwrap();
    await_end(server);
}

/// Of its first thread: field 19 of its stat, the 16th after the name.
fn nice_of(process: Pid) -> i32 {
    let path = format!("/proc/{}/stat", process.as_raw_pid());
    let stat = fs::read_to_string(path).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(16).unwrap().parse().unwrap()
}

/// The other child of a supervisor whose program is a child too.
fn private_server_of(supervisor: &str) -> Pid {
    let list = format!("/proc/{supervisor}/task/{supervisor}/children");
    let children = fs::read_to_string(list).unwrap();
    let server = children.split_whitespace().find(|pid| {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        arguments.contains("--private")
    });
    Pid::from_raw(server.unwrap().parse().unwrap()).unwrap()
}

/// Waits for the end of a process that is nobody's child here.
fn await_end(pid: Pid) {
    assert!(ends_within(pid, 50), "it lives on");
}

/// Within so many tenths of a second.
fn ends_within(pid: Pid, tenths: u64) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{PidfdFlags, pidfd_open};
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let patience = Timespec::try_from(Duration::from_millis(100 * tenths)).unwrap();
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)).unwrap() > 0
}

#[test]
fn orphans_stay_under_the_supervisor_until_they_end() {
    let installation = Installation::new();
    let fifo = installation.folder().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
    let script = format!("(echo ready $PPID; read x < {}; echo $x) & exit 5", fifo.display());
    let mut running = Running::start(installation.farmem(["run", "sh", "-c", &script]));
    // In the orphan $PPID is still the program's parent: farmem.
    let farmem = running.words[0].parse().unwrap();
    assert_eq!(Pid::from_child(&running.farmem), Pid::from_raw(farmem).unwrap());
    assert!(running.farmem.try_wait().unwrap().is_none());
    fs::write(&fifo, "orphan\n").unwrap();
    assert_eq!(running.wait_silence(), "orphan\n");
    assert_eq!(running.farmem.wait().unwrap().code(), Some(5));
}
