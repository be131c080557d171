//! What the builder must know of a Dockerfile before buildah reads it.
//!
//! Owns: which images it names, which line every step of the build stands on, and the few rewrites that let this node
//! build it. Never builds anything, and never touches the user's file: the rewritten text is written elsewhere.
//!
//! Rewritten are: `FROM --platform=…` (a node builds for its own kind of CPU), and `RUN <<EOF` (buildah before 1.33
//! does not know here-documents). Edits keep to the byte ranges that the parser reports.

use std::{collections::BTreeMap, ops::Range};

use parse_dockerfile::{Command, Instruction, Source};

mod variables;

/// Far above any Dockerfile written by a person.
const MAX_BYTES: usize = 1 << 20;
/// How much of a step is shown in messages.
const SHOWN_CHARS: usize = 120;

/// Why a Dockerfile cannot be built here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerfileError {
    #[error("the Dockerfile is larger than {} MiB", MAX_BYTES >> 20)]
    TooLarge,
    #[error("the Dockerfile is not UTF-8 text")]
    NotText,
    #[error("Dockerfile line {line}: {why}")]
    Line { line: usize, why: String },
    #[error("the Dockerfile cannot be read: {why}")]
    Syntax { why: String },
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    /// Counted from 1.
    pub line: usize,
    /// The instruction as the user wrote it, on one line and not too long.
    pub text: String,
}

/// An image that the Dockerfile takes from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageUse {
    /// As written, with variables filled in.
    pub reference: String,
    /// Where it is named first.
    pub line: usize,
}

/// A Dockerfile that was read.
#[derive(Debug)]
pub(crate) struct Dockerfile {
    /// What buildah is given.
    pub text: String,
    /// For the build log: what was rewritten.
    pub notes: Vec<String>,
    /// In order of appearance, each once. Stages and `scratch` are not among them.
    pub images: Vec<ImageUse>,
    /// Ports that the last stage EXPOSEs as plain numbers, in order.
    pub exposed: Vec<u16>,
    /// Per stage: FROM and what follows it.
    stages: Vec<Vec<Step>>,
}

impl Dockerfile {
    pub fn parse(bytes: &[u8]) -> Result<Self, DockerfileError> {
        if bytes.len() > MAX_BYTES {
            return Err(DockerfileError::TooLarge);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| DockerfileError::NotText)?;
        if text.contains('\0') {
            return Err(DockerfileError::NotText);
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let parsed = parse_dockerfile::parse(text).map_err(|error| syntax_error(text, &error))?;
        Reader { text, edits: Vec::new(), notes: Vec::new(), images: Vec::new(), stage_names: Vec::new() }.read(&parsed)
    }

    /// The step that buildah calls `STEP step/total` of stage `stage` (from 1; `None` if there is only one).
    pub fn step(&self, stage: Option<usize>, step: usize, total: usize) -> Option<&Step> {
        let steps = match stage {
            Some(stage) => self.stages.get(stage.checked_sub(1)?)?,
            None => self.stages.last()?,
        };
        // Triggers of the base image (ONBUILD) are steps that no line stands for; they follow FROM.
        let triggers = total.saturating_sub(steps.len());
        steps.get(step.saturating_sub(1).saturating_sub(triggers))
    }
}

fn syntax_error(text: &str, error: &parse_dockerfile::Error) -> DockerfileError {
    let line = error.line();
    let mut why = format!("{error:#}");
    let above: Vec<&str> = text.lines().take(line.saturating_sub(1)).collect();
    if above.iter().any(|above| above.contains("<<")) {
        why.push_str(" (a here-document is understood only directly behind RUN)");
    }
    if line == 0 { DockerfileError::Syntax { why } } else { DockerfileError::Line { line, why } }
}

struct Reader<'t> {
    text: &'t str,
    edits: Vec<(Range<usize>, String)>,
    notes: Vec<String>,
    images: Vec<ImageUse>,
    /// Lower case; an unnamed stage has an empty name.
    stage_names: Vec<String>,
}

impl Reader<'_> {
    fn read(mut self, parsed: &parse_dockerfile::Dockerfile<'_>) -> Result<Dockerfile, DockerfileError> {
        let mut variables = variables::predefined();
        for arg in parsed.global_args() {
            variables::define(&mut variables, &arg.arguments.value);
        }
        let mut stages = Vec::new();
        let mut exposed = Vec::new();
        for stage in parsed.stages() {
            let from_at = stage.from.from.span.start;
            let mut steps = vec![self.step(from_at)];
            self.read_from(stage.from, &variables)?;
            let mut shell = None;
            exposed.clear();
            for instruction in stage.instructions {
                steps.push(self.step(start_of(instruction)));
                self.read_instruction(instruction, &mut shell, &mut exposed)?;
            }
            self.stage_names.push(stage.from.as_.as_ref().map(|(_, name)| name.value.to_lowercase()).unwrap_or_default());
            stages.push(steps);
        }
        let mut text = self.text.to_owned();
        self.edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
        for (range, with) in self.edits {
            text.replace_range(range, &with);
        }
        Ok(Dockerfile { text, notes: self.notes, images: self.images, exposed, stages })
    }

    fn line(&self, at: usize) -> usize {
        self.text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn step(&self, at: usize) -> Step {
        let first = self.text[at..].lines().next().unwrap_or_default().trim_end();
        let (body, goes_on) = match first.strip_suffix('\\') {
            Some(body) => (body.trim_end(), true),
            None => (first, false),
        };
        let mut text: String = body.chars().take(SHOWN_CHARS).collect();
        if goes_on || body.chars().count() > SHOWN_CHARS {
            text.push_str(" …");
        }
        Step { line: self.line(at), text }
    }

    fn read_from(&mut self, from: &parse_dockerfile::FromInstruction<'_>, variables: &BTreeMap<String, String>) -> Result<(), DockerfileError> {
        let at = from.from.span.start;
        for flag in from.options.iter().filter(|flag| flag.name.value == "platform") {
            let platform = flag.value.as_ref().map(|value| value.value.as_ref()).unwrap_or_default();
            self.notes.push(format!(
                "Dockerfile line {}: --platform={platform} is left out; this node builds for linux/{}.",
                self.line(at),
                variables::ARCHITECTURE
            ));
            self.edits.push((flag.span(), " ".repeat(flag.span().len())));
        }
        let reference = variables::expand(&from.image.value, variables);
        if reference.is_empty() {
            let why = format!("FROM {} names no image; the variables in it are empty", from.image.value);
            return Err(DockerfileError::Line { line: self.line(at), why });
        }
        self.use_image(reference, at);
        Ok(())
    }

    /// Remembers an image unless it is a stage above.
    fn use_image(&mut self, reference: String, at: usize) {
        let is_stage = self.stage_names.contains(&reference.to_lowercase());
        if reference != "scratch" && !is_stage && self.images.iter().all(|image| image.reference != reference) {
            self.images.push(ImageUse { reference, line: self.line(at) });
        }
    }

    /// `--from=` may also be the number of a stage.
    fn use_source(&mut self, from: &str, at: usize) {
        if !from.is_empty() && !from.bytes().all(|byte| byte.is_ascii_digit()) {
            self.use_image(from.to_owned(), at);
        }
    }

    fn read_instruction(
        &mut self,
        instruction: &Instruction<'_>,
        shell: &mut Option<Vec<String>>,
        exposed: &mut Vec<u16>,
    ) -> Result<(), DockerfileError> {
        let at = start_of(instruction);
        match instruction {
            Instruction::Copy(copy) => {
                for flag in copy.options.iter().filter(|flag| flag.name.value == "from") {
                    self.use_source(flag.value.as_ref().map(|value| value.value.as_ref()).unwrap_or_default(), at);
                }
                self.refuse_here_documents(&copy.src, at)?;
            }
            Instruction::Add(add) => self.refuse_here_documents(&add.src, at)?,
            Instruction::Run(run) => {
                for flag in run.options.iter().filter(|flag| flag.name.value == "mount") {
                    let mount = flag.value.as_ref().map(|value| value.value.as_ref()).unwrap_or_default();
                    for from in mount.split(',').filter_map(|part| part.strip_prefix("from=")) {
                        self.use_source(from, at);
                    }
                }
                self.rewrite_here_document(run, shell.as_deref())?;
            }
            Instruction::Shell(set) => *shell = Some(set.arguments.iter().map(|word| word.value.as_ref().to_owned()).collect()),
            Instruction::Expose(expose) => {
                let ports = expose.arguments.iter().map(|port| port.value.split('/').next().unwrap_or_default());
                exposed.extend(ports.filter_map(|port| port.parse::<u16>().ok()));
            }
            _ => {}
        }
        Ok(())
    }

    fn refuse_here_documents(&self, sources: &[Source<'_>], at: usize) -> Result<(), DockerfileError> {
        if sources.iter().any(|source| matches!(source, Source::HereDoc(_))) {
            let why = "COPY and ADD with a here-document are not supported here; put the text into a file of the archive";
            return Err(DockerfileError::Line { line: self.line(at), why: why.to_owned() });
        }
        Ok(())
    }

    /// `RUN <<EOF` becomes the exec form of the same script.
    fn rewrite_here_document(&mut self, run: &parse_dockerfile::RunInstruction<'_>, shell: Option<&[String]>) -> Result<(), DockerfileError> {
        let Some(document) = run.here_docs.first() else { return Ok(()) };
        let line = self.line(run.run.span.start);
        if let Command::Shell(rest) = &run.arguments
            && !rest.value.trim().is_empty()
        {
            let why = format!("`{}` behind the name of a here-document is not supported here; move it into the script", rest.value.trim());
            return Err(DockerfileError::Line { line, why });
        }
        let mut words: Vec<&str> = match shell {
            Some(shell) => shell.iter().map(String::as_str).collect(),
            None => vec!["/bin/sh", "-c"],
        };
        if document.value.starts_with("#!") {
            // A script with an interpreter of its own is run as a file; `$0` is its text.
            words = vec!["/bin/sh", "-c", RUN_AS_FILE];
        }
        words.push(&document.value);
        let words: Vec<String> = words.into_iter().map(json_string).collect();
        let begin = run.options.last().map_or(run.run.span.end, |flag| flag.span().end);
        // The closing word and the rest of its line go as well.
        let end = self.text[document.span.end..].find('\n').map_or(self.text.len(), |newline| document.span.end + newline);
        self.edits.push((begin..end, format!(" [{}]", words.join(","))));
        Ok(())
    }
}

const RUN_AS_FILE: &str =
    r#"f=$(mktemp) && printf %s "$0" >"$f" && chmod 700 "$f" && "$f"; status=$?; rm -f "$f"; exit $status"#;

fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn start_of(instruction: &Instruction<'_>) -> usize {
    let keyword = match instruction {
        Instruction::Add(it) => &it.add,
        Instruction::Arg(it) => &it.arg,
        Instruction::Cmd(it) => &it.cmd,
        Instruction::Copy(it) => &it.copy,
        Instruction::Entrypoint(it) => &it.entrypoint,
        Instruction::Env(it) => &it.env,
        Instruction::Expose(it) => &it.expose,
        Instruction::From(it) => &it.from,
        Instruction::Healthcheck(it) => &it.healthcheck,
        Instruction::Label(it) => &it.label,
        Instruction::Maintainer(it) => &it.maintainer,
        Instruction::Onbuild(it) => &it.onbuild,
        Instruction::Run(it) => &it.run,
        Instruction::Shell(it) => &it.shell,
        Instruction::Stopsignal(it) => &it.stopsignal,
        Instruction::User(it) => &it.user,
        Instruction::Volume(it) => &it.volume,
        Instruction::Workdir(it) => &it.workdir,
        // The parser's enum may grow; an instruction without a place is shown at the top.
        _ => return 0,
    };
    keyword.span.start
}

#[cfg(test)]
mod tests;
