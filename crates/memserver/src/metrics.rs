//! The server's figures in the text format of Prometheus, version 0.0.4.
//!
//! Names begin with `farmem_server_`; counters end in `_total`, amounts are bytes, times seconds.

use std::fmt::{Display, Write};
use std::time::Duration;

use farmem_wire::{CountOf, ServerStat, StatCount};

use crate::counters::{Counters, Served};

/// Content-Type of the text.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the HTTP server needs of the engine, taken at one moment.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    pub(crate) stat: ServerStat,
    pub(crate) counters: &'a Counters,
    pub(crate) incarnation: u64,
    pub(crate) uptime: Duration,
}

/// Fields of a stat that have their own place below.
const SHOWN_APART: [&str; 6] = [
    "requests",
    "refusals",
    "read_p50_nanos",
    "read_p99_nanos",
    "write_p50_nanos",
    "write_p99_nanos",
];

/// Fields of a stat that count why peers were dropped.
const DROPPED: [&str; 8] = [
    "bad_magic",
    "bad_header_crc",
    "bad_body_crc",
    "too_large",
    "bad_version",
    "silent_peers",
    "stalled_peers",
    "slow_readers",
];

/// Fields of a stat that only grow. All others go up and down.
const COUNTERS: [&str; 13] = [
    "reads",
    "writes",
    "pages_read",
    "pages_written",
    "bytes_in",
    "bytes_out",
    "damaged_pages",
    "connections_accepted",
    "connections_refused",
    "sessions_timed_out",
    "demoted_pages",
    "promoted_pages",
    "tier_failures",
];

/// All figures.
pub(crate) fn render(snapshot: &Snapshot<'_>) -> String {
    let Snapshot { stat, counters, incarnation, uptime } = snapshot;
    let mut text = Text(String::with_capacity(16 << 10));
    text.head("info", "gauge", "Which process this is: 1.");
    let version = env!("CARGO_PKG_VERSION");
    let labels = format!("version=\"{version}\",incarnation=\"{incarnation:016x}\"");
    text.sample("info", &labels, 1);
    text.head("uptime_seconds", "gauge", "Seconds since the server's start.");
    text.sample("uptime_seconds", "", uptime.as_secs_f64());
    text.head("free_bytes", "gauge", "Bytes that are not promised to anybody.");
    text.sample("free_bytes", "", stat.promise_bytes.saturating_sub(stat.reserved_bytes));
    fields(&mut text, stat);
    requests(&mut text, &counters.served);
    durations(&mut text, &counters.served);
    text.0
}

/// One metric for each field of the stat, but for those that are labels of one.
fn fields(text: &mut Text, stat: &ServerStat) {
    let dropped = "Peers dropped, by the reason.";
    text.head("dropped_peers_total", "counter", dropped);
    let all = || ServerStat::NAMES.into_iter().zip(stat.values());
    for (name, value) in all().filter(|(name, _)| DROPPED.contains(name)) {
        text.sample("dropped_peers_total", &format!("reason=\"{name}\""), value);
    }
    for ((name, value), help) in all().zip(ServerStat::MEANINGS) {
        if SHOWN_APART.contains(&name) || DROPPED.contains(&name) {
            continue;
        }
        let (kind, suffix) =
            if COUNTERS.contains(&name) { ("counter", "_total") } else { ("gauge", "") };
        let name = format!("{name}{suffix}");
        text.head(&name, kind, help.trim());
        text.sample(&name, "", value);
    }
}

fn requests(text: &mut Text, served: &Served) {
    let help = "Requests answered, by action and outcome.";
    text.head("requests_total", "counter", help);
    for StatCount { of, count } in served.counts() {
        let (action, outcome) = match of {
            CountOf::Granted(action) => (action, "granted"),
            CountOf::Refused(action) => (action, "refused"),
            CountOf::Refusals(_) => continue,
        };
        let labels = format!("action=\"{}\",outcome=\"{outcome}\"", action.name());
        text.sample("requests_total", &labels, count);
    }
    text.head("refusals_total", "counter", "Requests refused, by the code of the refusal.");
    for StatCount { of, count } in served.counts() {
        if let CountOf::Refusals(code) = of {
            text.sample("refusals_total", &format!("code=\"{}\"", code.name()), count);
        }
    }
}

fn durations(text: &mut Text, served: &Served) {
    const NAME: &str = "request_duration_seconds";
    let help = "From the arrival of a request's last byte to its reply's being ready to be sent.";
    text.head(NAME, "histogram", help);
    for action in served.actions() {
        let (latency, action) = (served.latency(action), action.name());
        let mut all = 0;
        for (bound, sum) in latency.cumulated() {
            let bound = bound.map_or_else(|| "+Inf".to_owned(), |bound| seconds(bound).to_string());
            let labels = format!("action=\"{action}\",le=\"{bound}\"");
            text.sample(&format!("{NAME}_bucket"), &labels, sum);
            all = sum;
        }
        let labels = format!("action=\"{action}\"");
        text.sample(&format!("{NAME}_sum"), &labels, seconds(latency.sum_nanos()));
        text.sample(&format!("{NAME}_count"), &labels, all);
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// The text, as it grows.
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP farmem_server_{name} {help}");
        let _ = writeln!(self.0, "# TYPE farmem_server_{name} {kind}");
    }

    /// No label of ours holds what would have to be escaped.
    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = if labels.is_empty() {
            writeln!(self.0, "farmem_server_{name} {value}")
        } else {
            writeln!(self.0, "farmem_server_{name}{{{labels}}} {value}")
        };
    }
}

#[cfg(test)]
mod tests {
    use farmem_wire::{Action, RefusalCode};

    use super::*;

    #[test]
    fn what_is_counted_is_shown_in_the_text_format() {
        let counters = Counters::default();
        counters.served.granted(Action::Read, 300);
        counters.served.granted(Action::Read, 900);
        counters.served.refused(Action::Setup, RefusalCode::Full, 100);
        let mut stat = ServerStat {
            memory_bytes: 100,
            promise_bytes: 100,
            reserved_bytes: 40,
            ..Default::default()
        };
        counters.fill(&mut stat);
        let uptime = Duration::from_millis(1500);
        let text = render(&Snapshot { stat, counters: &counters, incarnation: 7, uptime });
        for line in [
            "farmem_server_uptime_seconds 1.5",
            "farmem_server_memory_bytes 100",
            "farmem_server_free_bytes 60",
            "# HELP farmem_server_reserved_bytes Bytes promised to sessions.",
            "# TYPE farmem_server_reserved_bytes gauge",
            "farmem_server_pages_read_total 0",
            "farmem_server_dropped_peers_total{reason=\"slow_readers\"} 0",
            "farmem_server_requests_total{action=\"read\",outcome=\"granted\"} 2",
            "farmem_server_requests_total{action=\"setup\",outcome=\"refused\"} 1",
            "farmem_server_refusals_total{code=\"full\"} 1",
            "farmem_server_request_duration_seconds_bucket{action=\"read\",le=\"0.00000025\"} 0",
            "farmem_server_request_duration_seconds_bucket{action=\"read\",le=\"0.0000005\"} 1",
            "farmem_server_request_duration_seconds_bucket{action=\"read\",le=\"0.000001\"} 2",
            "farmem_server_request_duration_seconds_bucket{action=\"read\",le=\"+Inf\"} 2",
            "farmem_server_request_duration_seconds_sum{action=\"read\"} 0.0000012",
            "farmem_server_request_duration_seconds_count{action=\"read\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        assert_is_well_formed(&text);
    }

    /// Every sample has a head with its type before it, and no name has two.
    fn assert_is_well_formed(text: &str) {
        let mut types = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap();
                assert!(!types.contains(&name), "{name} twice");
                types.push(name);
            } else if !line.starts_with('#') {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                let name = sample.split('{').next().unwrap();
                assert!(types.last().is_some_and(|last| name.starts_with(last)), "{line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
            }
        }
    }

    #[test]
    fn all_names_are_fields_of_the_stat() {
        for name in SHOWN_APART.iter().chain(&DROPPED).chain(&COUNTERS) {
            assert!(ServerStat::NAMES.contains(name), "{name}");
        }
    }
}
