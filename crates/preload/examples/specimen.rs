//! The programs under which the tests put the preload library: each does what real programs do that
//! could notice a watcher, or be harmed by one. `specimen NAME [ARGUMENT...]` prints what it sees.
#![expect(unsafe_code, reason = "the programs make the system calls that matter themselves")]
#![expect(clippy::print_stdout, reason = "a program's output is what the tests read")]

use std::ffi::c_void;
use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio, exit};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["look"] => look(),
        ["forks", count] => forks(number(count)),
        ["exec-loop", count] => exec_loop(number(count)),
        ["grow", mebibytes, milliseconds] => grow(number(mebibytes), number(milliseconds)),
        ["daemon", file] => daemon(file),
        ["setuid", user] => setuid(number(user)),
        ["leader-exits", mebibytes] => leader_exits(number(mebibytes)),
        ["supervise", name, ref program @ ..] => supervise(name, program),
        ["subreaper", ref program @ ..] => subreaper(program),
        _ => panic!("no such program: {arguments:?}"),
    }
}

fn number(text: &str) -> usize {
    text.parse().expect("a number")
}

static CHILD_SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_child_signal(_: i32) {
    CHILD_SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// What a program can see of its children, threads, descriptors and limits.
fn look() {
    let handler: extern "C" fn(i32) = count_child_signal;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the handler only counts; the other calls write what they are given.
    let (waited, errno) = unsafe {
        libc::signal(libc::SIGCHLD, handler as libc::sighandler_t);
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        let all = libc::WNOHANG | libc::__WALL;
        (libc::waitpid(-1, std::ptr::null_mut(), all), io::Error::last_os_error())
    };
    println!("wait {waited} {:?}", errno.raw_os_error());
    println!("tasks {}", fs::read_dir("/proc/self/task").expect("readable").count());
    // One of them is the directory itself.
    println!("descriptors {}", fs::read_dir("/proc/self/fd").expect("readable").count() - 1);
    println!("limit {}", limit.rlim_cur);
    println!("signals {}", CHILD_SIGNALS.load(Ordering::Relaxed));
}

/// Short children, some at a time; each must be waited for exactly once, with its own status.
fn forks(count: usize) {
    const AT_ONCE: usize = 20;
    let mut left = count;
    while left > 0 {
        let batch = left.min(AT_ONCE);
        for status in 0..batch {
            // SAFETY: the child only exits.
            match unsafe { libc::fork() } {
                // SAFETY: ends the child.
                0 => unsafe { libc::_exit(status as i32) },
                child => assert!(child > 0, "fork: {}", io::Error::last_os_error()),
            }
        }
        let mut sum = 0;
        for _ in 0..batch {
            let mut status = 0;
            // SAFETY: the status is written.
            let child = unsafe { libc::waitpid(-1, &raw mut status, 0) };
            assert!(child > 0 && libc::WIFEXITED(status), "{child} {status}");
            sum += libc::WEXITSTATUS(status) as usize;
        }
        assert_eq!(sum, batch * (batch - 1) / 2);
        left -= batch;
    }
    // SAFETY: no status is asked for.
    let rest = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL) };
    println!("forked {count} rest {rest}");
}

/// Replaces itself again and again, with some memory each time.
fn exec_loop(count: usize) {
    let memory = vec![1u8; 8 * MIB];
    if count == 0 {
        println!("done {}", memory.len());
        return;
    }
    let error = Command::new("/proc/self/exe").args(["exec-loop", &(count - 1).to_string()]).exec();
    panic!("{error}");
}

/// Fills memory beyond the limit, goes on allocating, and sees whether others move the break.
fn grow(mebibytes: usize, milliseconds: usize) {
    let memory: Vec<Vec<u8>> = (0..mebibytes).map(|each| vec![each as u8; MIB]).collect();
    let end = Instant::now() + Duration::from_millis(milliseconds as u64);
    let mut moves = 0u64;
    while Instant::now() < end {
        // SAFETY: this program's own allocator uses no break after the pages that it has had; the
        // new page is written here only.
        unsafe {
            let before = libc::sbrk(4096);
            assert_ne!(before, usize::MAX as *mut c_void, "{}", io::Error::last_os_error());
            before.cast::<u8>().write_bytes(7, 4096);
            assert_eq!(libc::sbrk(0).addr(), before.addr() + 4096, "somebody moved the break");
            libc::sbrk(-4096);
            assert_eq!(libc::sbrk(0), before, "somebody moved the break");
        }
        let scratch: Vec<String> = (0..100).map(|each| format!("{moves} {each}")).collect();
        assert!(scratch[99].ends_with("99"));
        moves += 1;
    }
    await_end_of_input();
    let right = memory.iter().enumerate().all(|(each, part)| part.iter().all(|&b| b == each as u8));
    println!("grown {mebibytes} right {right}");
}

/// A test that has something to see closes the pipe when it has seen it.
fn await_end_of_input() {
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
}

/// Leaves its parent, session, directory and all descriptors, as daemons do.
fn daemon(file: &str) {
    // SAFETY: between the forks there is one thread; nothing uses the descriptors that are closed.
    unsafe {
        if libc::fork() != 0 {
            libc::_exit(0);
        }
        libc::setsid();
        if libc::fork() != 0 {
            libc::_exit(0);
        }
        libc::chdir(c"/".as_ptr());
        libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
    }
    let memory = vec![3u8; 64 * MIB];
    // It has closed its input, so this must do for what is to be seen.
    std::thread::sleep(Duration::from_secs(1));
    let right = memory.iter().all(|&byte| byte == 3);
    fs::write(file, format!("daemon right {right}")).expect("the file can be written");
}

/// Gives up its user, on all its threads, as glibc's setuid does by a signal to each.
fn setuid(user: usize) {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || receiver.recv().is_err());
    // SAFETY: takes a number.
    let changed = unsafe { libc::setuid(user as libc::uid_t) };
    drop(sender);
    let ended = other.join().expect("the other thread ends");
    let memory = vec![5u8; 64 * MIB];
    await_end_of_input();
    println!("setuid {changed} {ended} {}", memory.iter().all(|&byte| byte == 5));
}

/// The first thread ends; another one goes on, and then fills memory.
fn leader_exits(mebibytes: usize) {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        grow(mebibytes, 100);
        io::stdout().flush().expect("the output is read");
        exit(0);
    });
    // SAFETY: ends this thread alone; nothing of its stack is used by the other.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

fn become_subreaper() {
    // SAFETY: takes numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

fn run_variable(name: &str) -> String {
    let value = std::env::var("FARMEM_RUN").expect("set by the test");
    let rest = value.splitn(3, ':').nth(2).expect("v1:NAME:REST");
    format!("v1:{name}:{rest}")
}

/// Stands for `farmem run`: listens, starts the program, prints its process id, waits to be killed.
fn supervise(name: &str, program: &[&str]) {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
    };
    become_subreaper();
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a socket");
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("a name");
    bind(&listener, &address).expect("the name is free");
    listen(&listener, 16).expect("it listens");
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .env("FARMEM_RUN", run_variable(name))
        .env("LD_PRELOAD", std::env::var_os("LD_PRELOAD_LATER").expect("set by the test"))
        .stdout(Stdio::null())
        .spawn()
        .expect("the program starts");
    println!("{}", child.id());
    child.wait().expect("it is a child");
}

/// Becomes the parent of the program's watcher, and ends before the program.
#[expect(clippy::zombie_processes, reason = "the program is meant to outlive this one")]
fn subreaper(program: &[&str]) {
    become_subreaper();
    Command::new(program[0]).args(&program[1..]).spawn().expect("the program starts");
    // Long enough for the watcher to be there; the test counts it.
    std::thread::sleep(Duration::from_millis(100));
}
