//! `farmem server`: looks at memory servers.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use farmem_remote::admin;
use farmem_transport::ServerAddress;
use farmem_wire::{CountOf, ServerStat, StatCount};
use serde_json::{Map, Value};

use crate::cli::{OutputForm, ServerShowOptions};
use crate::size::Size;
use crate::{standard_output, table};

/// A server that is up answers within a millisecond; a person waits this long for one that is not.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Prints how one memory server is.
pub(crate) fn show(options: &ServerShowOptions) -> anyhow::Result<ExitCode> {
    let address: ServerAddress = options.server.parse()?;
    let endpoint = address.resolve().with_context(|| format!("cannot resolve {address}"))?;
    let (stat, counts) = admin::stat_with_counts(&endpoint, TIMEOUT)?;
    match options.output.form() {
        OutputForm::Json => standard_output::write_json(&json(&address, &stat, &counts))?,
        OutputForm::Table => standard_output::write(in_words(&address, &stat, &counts))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn json(address: &ServerAddress, stat: &ServerStat, counts: &[StatCount]) -> Value {
    let mut fields = Map::new();
    fields.insert("server".to_owned(), address.to_string().into());
    for (name, value) in ServerStat::NAMES.iter().zip(stat.values()) {
        fields.insert((*name).to_owned(), value.into());
    }
    for group in ["granted", "refused", "refusals_by_code"] {
        let members = counts.iter().map(|count| (group_and_name(count.of), count.count));
        let members = members.filter(|((of, _), _)| *of == group);
        let members = members.map(|((_, name), count)| (name, count.into())).collect();
        fields.insert(group.to_owned(), Value::Object(members));
    }
    Value::Object(fields)
}

/// Where a count belongs, and its name there.
fn group_and_name(of: CountOf) -> (&'static str, String) {
    match of {
        CountOf::Granted(action) => ("granted", action.name()),
        CountOf::Refused(action) => ("refused", action.name()),
        CountOf::Refusals(code) => ("refusals_by_code", code.name()),
    }
}

fn in_words(address: &ServerAddress, stat: &ServerStat, counts: &[StatCount]) -> String {
    let mut rows = vec![["server".to_owned(), address.to_string()]];
    for (name, value) in ServerStat::NAMES.iter().zip(stat.values()) {
        let row = if let Some(name) = name.strip_suffix("_bytes") {
            [name.to_owned(), Size(value).to_string()]
        } else if let Some(name) = name.strip_suffix("_nanos") {
            [name.to_owned(), format!("{} us", value as f64 / 1e3)]
        } else {
            [(*name).to_owned(), value.to_string()]
        };
        rows.push(row);
    }
    for StatCount { of, count } in counts {
        let what = match of {
            CountOf::Granted(action) => format!("granted: {}", action.name()),
            CountOf::Refused(action) => format!("refused: {}", action.name()),
            CountOf::Refusals(code) => format!("refused because: {}", code.name()),
        };
        rows.push([what, count.to_string()]);
    }
    table::lay_out(["WHAT", "VALUE"], &rows)
}
