//! The port for metrics: what it shows, and whoever misbehaves there.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use farmem_wire::RefusalCode;

use crate::raw::{Raw, TestServer};

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: farmem\r\n\r\n";

fn start() -> (TestServer, SocketAddr) {
    let server = TestServer::start(64, |config| {
        config.metrics = Some(([127, 0, 0, 1], 0).into());
        config.limits.metrics_timeout = Duration::from_millis(300);
    });
    let address = server.metrics.unwrap();
    (server, address)
}

/// Sends `request` and returns all that is answered.
fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn metrics_show_what_was_asked_and_refused() {
    let (server, address) = start();
    let mut client = Raw::with_region(&server, 8);
    client.write(&[(0, 1, 1), (1, 1, 2)]).unwrap();
    client.read(&[(0, 1), (1, 1)]).unwrap();
    assert_eq!(client.read(&[(7, 0)]), Err(RefusalCode::NoPage));
    let answer = ask(address, GET.as_bytes());
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    for line in [
        "farmem_server_memory_bytes 262144",
        "farmem_server_reserved_bytes 32768",
        "farmem_server_free_bytes 229376",
        "farmem_server_used_bytes 8192",
        "farmem_server_sessions 1",
        "farmem_server_connections 1",
        "farmem_server_pages_read_total 2",
        "farmem_server_pages_written_total 2",
        "farmem_server_requests_total{action=\"read\",outcome=\"granted\"} 1",
        "farmem_server_requests_total{action=\"read\",outcome=\"refused\"} 1",
        "farmem_server_requests_total{action=\"hello\",outcome=\"granted\"} 1",
        "farmem_server_refusals_total{code=\"no_page\"} 1",
        "farmem_server_request_duration_seconds_count{action=\"read\"} 2",
        "farmem_server_request_duration_seconds_count{action=\"write\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
    let stat = server.stat();
    assert_eq!(stat.refusals, 1);
    assert!(stat.read_p50_nanos > 0 && stat.read_p99_nanos >= stat.read_p50_nanos);
    assert!(ask(address, b"GET /livez HTTP/1.1\r\n\r\n").ends_with("\r\n\r\nok\n"));
    assert!(ask(address, b"HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
}

#[test]
fn malformed_http_is_refused_and_harms_nobody() {
    let (_server, address) = start();
    let long = [b"GET / HTTP/1.1\r\nCookie: ".to_vec(), vec![b'x'; 64 << 10]].concat();
    for (request, status) in [
        (&b"\r\n\r\n"[..], "400"),
        (b"GET\r\n\r\n", "400"),
        (b"GET /metrics\r\n\r\n", "400"),
        (b"\xff\xfe\0\x01 \x80 \x81\r\n\r\n", "400"),
        (b"GET /metrics HTTP/3\r\n\r\n", "505"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", "404"),
        (&long, "431"),
    ] {
        let answer = ask(address, request);
        let shown = String::from_utf8_lossy(&request[..request.len().min(60)]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{shown}: {answer}");
    }
    // Two requests on one connection: the first is answered.
    let both = ask(address, [GET, GET].concat().as_bytes());
    assert_eq!(both.matches("HTTP/1.1 200 OK").count(), 1);
    // One that comes a byte at a time is a request all the same.
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    GET.bytes().for_each(|byte| stream.write_all(&[byte]).unwrap());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"));
    // Half of one is none.
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&GET.as_bytes()[..10]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn silent_visitors_are_dropped_in_time_and_do_not_hold_up_a_stop() {
    let (mut server, address) = start();
    // More than are served at a time; all of them owe the rest of their request.
    let mut silent: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    for stream in &mut silent {
        stream.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
    }
    assert!(ask(address, GET.as_bytes()).starts_with("HTTP/1.1 200"));
    for stream in &mut silent {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(!matches!(stream.read(&mut [0; 64]), Ok(1..)), "nothing was asked for");
    }
    // One that does not take its answer, and one that says nothing.
    let mut deaf = TcpStream::connect(address).unwrap();
    deaf.write_all(GET.as_bytes()).unwrap();
    let _silent = TcpStream::connect(address).unwrap();
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_millis(250), "{:?}", began.elapsed());
}
