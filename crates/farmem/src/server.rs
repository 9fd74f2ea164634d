//! `farmem server`: looks at memory servers.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use farmem_remote::admin;
use farmem_transport::ServerAddress;
use farmem_wire::ServerStat;
use serde_json::{Map, Value};

use crate::cli::{OutputForm, ServerShowOptions};
use crate::size::Size;
use crate::table;

/// A server that is up answers within a millisecond; a person waits this long for one that is not.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Prints how one memory server is.
#[expect(clippy::print_stdout, reason = "the listing is the command's output")]
pub(crate) fn show(options: &ServerShowOptions) -> anyhow::Result<ExitCode> {
    let address: ServerAddress = options.server.parse()?;
    let endpoint = address.resolve().with_context(|| format!("cannot resolve {address}"))?;
    let stat = admin::stat(&endpoint, TIMEOUT)?;
    match options.output.form() {
        OutputForm::Json => {
            println!("{}", serde_json::to_string_pretty(&json(&address, &stat))?);
        }
        OutputForm::Table => print!("{}", in_words(&address, &stat)),
    }
    Ok(ExitCode::SUCCESS)
}

fn json(address: &ServerAddress, stat: &ServerStat) -> Value {
    let mut fields = Map::new();
    fields.insert("server".to_owned(), address.to_string().into());
    for (name, value) in ServerStat::NAMES.iter().zip(stat.values()) {
        fields.insert((*name).to_owned(), value.into());
    }
    Value::Object(fields)
}

fn in_words(address: &ServerAddress, stat: &ServerStat) -> String {
    let mut rows = vec![["server".to_owned(), address.to_string()]];
    for (name, value) in ServerStat::NAMES.iter().zip(stat.values()) {
        let row = match name.strip_suffix("_bytes") {
            Some(name) => [name.to_owned(), Size(value).to_string()],
            None => [(*name).to_owned(), value.to_string()],
        };
        rows.push(row);
    }
    table::lay_out(["WHAT", "VALUE"], &rows)
}
