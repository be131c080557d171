//! What the builder must know of a Dockerfile before buildah reads it.
//!
//! Owns: which images it names, which line every step of the build stands on, and the few rewrites that let this node
//! build it. Never builds anything, and never touches the user's file: the rewritten text is written elsewhere.
//!
//! Rewritten are: `FROM --platform=…` (a node builds for its own kind of CPU), variables in FROM (buildah takes a stage that is named
//! by one for an image), here-documents (buildah before 1.33 does not know them), CMD and ENTRYPOINT in their shell form if there is a
//! SHELL (buildah takes `/bin/sh` for them), and flags that change nothing here and that buildah does not know. VOLUME goes to the end
//! of the file (buildah 1.28 throws away what later RUN steps write there). Every other line stays on its number.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use parse_dockerfile::{Flag, Instruction};

mod here_documents;
mod variables;

use here_documents::Joined;

/// Far above any Dockerfile written by a person.
const MAX_BYTES: usize = 1 << 20;
/// How much of a step is shown in messages.
const SHOWN_CHARS: usize = 120;
/// How the rewritten Dockerfile calls the directory of [`Dockerfile::files`].
pub(crate) const FILES: &str = "dormouse-here-documents";

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
    /// In order of appearance, each once. Stages and `scratch` are not among them, nor is what only stages name that are not built:
    /// those that the last one does not need.
    pub images: Vec<ImageUse>,
    /// Ports that the last stage, and stages that it is made from, EXPOSE as plain numbers, in order.
    pub exposed: Vec<u16>,
    /// What COPY and ADD take from here-documents: path below [`FILES`], and text.
    pub files: Vec<(String, String)>,
    /// Per stage: FROM and what follows it, in the order of `text`.
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
        let found = here_documents::find(text)?;
        let parsed = parse_dockerfile::parse(&found.for_parser).map_err(|error| syntax_error(&error))?;
        Reader { text, here: found.instructions, ..Reader::default() }.read(&parsed)
    }

    /// The step that begins on a line, whether it is done or not.
    pub fn step_on(&self, line: usize) -> Option<&Step> {
        self.stages.iter().flatten().find(|step| step.line == line)
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

fn syntax_error(error: &parse_dockerfile::Error) -> DockerfileError {
    let (line, why) = (error.line(), format!("{error:#}"));
    if line == 0 { DockerfileError::Syntax { why } } else { DockerfileError::Line { line, why } }
}

#[derive(Default)]
struct Reader<'t> {
    text: &'t str,
    here: BTreeMap<usize, Joined>,
    edits: Vec<(Range<usize>, String)>,
    notes: Vec<String>,
    /// With the stage that names each.
    images: Vec<(usize, ImageUse)>,
    files: Vec<(String, String)>,
    /// Those before the one that is read, and that one.
    stages: Vec<Stage>,
    /// How many there will be.
    n_stages: usize,
}

#[derive(Default)]
struct Stage {
    /// Lower case; empty if it has none.
    name: String,
    steps: Vec<Step>,
    /// Stages that must be built before it.
    needs: BTreeSet<usize>,
    /// What it says or has from the stage that it is made from.
    shell: Option<Vec<String>>,
    exposed: Vec<u16>,
    volumes: Vec<(Step, String)>,
}

impl Reader<'_> {
    fn read(mut self, parsed: &parse_dockerfile::Dockerfile<'_>) -> Result<Dockerfile, DockerfileError> {
        let mut variables = variables::predefined();
        for arg in parsed.global_args() {
            variables::define(&mut variables, &arg.arguments.value);
        }
        self.n_stages = parsed.stages().len();
        for stage in parsed.stages() {
            self.stages.push(Stage { steps: vec![self.step(stage.from.from.span.start)], ..Stage::default() });
            self.read_from(stage.from, &variables)?;
            for instruction in stage.instructions {
                let step = self.step(start_of(instruction));
                self.stage().steps.push(step);
                self.read_instruction(instruction)?;
            }
            self.stage().name = stage.from.as_.as_ref().map(|(_, name)| name.value.to_lowercase()).unwrap_or_default();
        }
        if let Some(last) = self.stages.last_mut() {
            let (steps, lines): (Vec<Step>, Vec<String>) = std::mem::take(&mut last.volumes).into_iter().unzip();
            last.steps.extend(steps);
            self.edits.push((self.text.len()..self.text.len(), lines.concat()));
        }
        let images = self.needed_images();
        let mut text = self.text.to_owned();
        self.edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
        for (range, mut with) in self.edits {
            let lines = |text: &str| text.matches('\n').count();
            with.push_str(&"\n".repeat(lines(&text[range.clone()]).saturating_sub(lines(&with))));
            text.replace_range(range, &with);
        }
        let exposed = self.stages.last().map(|stage| stage.exposed.clone()).unwrap_or_default();
        let stages = self.stages.into_iter().map(|stage| stage.steps).collect();
        Ok(Dockerfile { text, notes: self.notes, images, exposed, files: self.files, stages })
    }

    /// What the last stage needs, and the stages that it needs.
    fn needed_images(&mut self) -> Vec<ImageUse> {
        let mut needed = BTreeSet::new();
        let mut open: Vec<usize> = self.stages.len().checked_sub(1).into_iter().collect();
        while let Some(stage) = open.pop() {
            if needed.insert(stage) {
                open.extend(&self.stages[stage].needs);
            }
        }
        let mut images: Vec<ImageUse> = Vec::new();
        for (stage, image) in self.images.drain(..) {
            if needed.contains(&stage) && images.iter().all(|other| other.reference != image.reference) {
                images.push(image);
            }
        }
        images
    }

    fn stage(&mut self) -> &mut Stage {
        self.stages.last_mut().expect("the stage that is read has been added")
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
            self.leave_out(flag, &format!("this node builds for linux/{}", variables::ARCHITECTURE));
        }
        let reference = variables::expand(&from.image.value, variables);
        if reference.is_empty() {
            let why = format!("FROM {} names no image; the variables in it are empty", from.image.value);
            return Err(DockerfileError::Line { line: self.line(at), why });
        }
        if reference != from.image.value {
            self.edits.push((from.image.span.clone(), reference.clone()));
        }
        if let Some(parent) = self.use_image(reference, at) {
            let Stage { shell, exposed, volumes, .. } = &self.stages[parent];
            let (shell, exposed, volumes) = (shell.clone(), exposed.clone(), volumes.clone());
            *self.stage() = Stage { shell, exposed, volumes, ..std::mem::take(self.stage()) };
        }
        Ok(())
    }

    /// Remembers an image. Returns which stage above it is, if it is one.
    fn use_image(&mut self, reference: String, at: usize) -> Option<usize> {
        let reading = self.stages.len() - 1;
        let stage = self.stages[..reading].iter().rposition(|stage| stage.name == reference.to_lowercase());
        match stage {
            Some(stage) => drop(self.stage().needs.insert(stage)),
            None if reference == "scratch" => {}
            None => self.images.push((reading, ImageUse { reference, line: self.line(at) })),
        }
        stage
    }

    /// `--from=` may also be the number of a stage.
    fn use_source(&mut self, from: &str, at: usize) {
        match from.parse::<usize>() {
            Ok(stage) if stage + 1 < self.stages.len() => drop(self.stage().needs.insert(stage)),
            Ok(_) => {}
            Err(_) if from.is_empty() => {}
            Err(_) => drop(self.use_image(from.to_owned(), at)),
        }
    }

    /// Takes a flag out that buildah does not know, or that means nothing on this node.
    fn leave_out(&mut self, flag: &Flag<'_>, why: &str) {
        let value = flag.value.as_ref().map(|value| format!("={}", value.value)).unwrap_or_default();
        self.notes.push(format!("Dockerfile line {}: --{}{value} is left out; {why}.", self.line(flag.span().start), flag.name.value));
        self.edits.push((flag.span(), " ".repeat(flag.span().len())));
    }

    fn read_instruction(&mut self, instruction: &Instruction<'_>) -> Result<(), DockerfileError> {
        let at = start_of(instruction);
        match instruction {
            Instruction::Copy(copy) => {
                for flag in copy.options.iter().filter(|flag| flag.name.value == "from") {
                    self.use_source(flag.value.as_ref().map(|value| value.value.as_ref()).unwrap_or_default(), at);
                }
                self.leave_out_link(&copy.options);
                self.rewrite_files(at, copy.copy.span.end, &copy.options)?;
            }
            Instruction::Add(add) => {
                self.leave_out_link(&add.options);
                self.rewrite_files(at, add.add.span.end, &add.options)?;
            }
            Instruction::Run(run) => {
                for flag in run.options.iter().filter(|flag| flag.name.value == "mount") {
                    let mount = flag.value.as_ref().map(|value| value.value.as_ref()).unwrap_or_default();
                    for from in mount.split(',').filter_map(|part| part.strip_prefix("from=")) {
                        self.use_source(from, at);
                    }
                }
                self.rewrite_script(run);
            }
            Instruction::Healthcheck(check) => {
                for flag in check.options.iter().filter(|flag| flag.name.value == "start-interval") {
                    self.leave_out(flag, "a HEALTHCHECK is not used here");
                }
            }
            // What a trigger does is done where it fires, but its here-document stands here.
            Instruction::Onbuild(trigger) => match *trigger.instruction {
                Instruction::Run(_) | Instruction::Copy(_) | Instruction::Add(_) => self.read_instruction(&trigger.instruction)?,
                _ => {}
            },
            Instruction::Cmd(cmd) => self.rewrite_command(at, cmd.cmd.span.end),
            Instruction::Entrypoint(entrypoint) => self.rewrite_command(at, entrypoint.entrypoint.span.end),
            Instruction::Volume(_) => self.move_volume(at),
            Instruction::Shell(set) => self.stage().shell = Some(set.arguments.iter().map(|word| word.value.as_ref().to_owned()).collect()),
            Instruction::Expose(expose) => {
                let ports = expose.arguments.iter().map(|port| port.value.split('/').next().unwrap_or_default());
                self.stage().exposed.extend(ports.filter_map(|port| port.parse::<u16>().ok()));
            }
            _ => {}
        }
        Ok(())
    }

    fn leave_out_link(&mut self, options: &[Flag<'_>]) {
        for flag in options.iter().filter(|flag| flag.name.value == "link") {
            self.leave_out(flag, "it is about a cache of layers, and nothing is cached here");
        }
    }

    /// `COPY <<NAME /to` copies a file that the builder writes.
    fn rewrite_files(&mut self, at: usize, keyword_end: usize, options: &[Flag<'_>]) -> Result<(), DockerfileError> {
        let Some(Joined { command, documents, end }) = self.here.remove(&at) else { return Ok(()) };
        let line = self.line(at);
        let refuse = |why: String| Err(DockerfileError::Line { line, why });
        let mut words = here_documents::words(&command);
        let to = words.pop().unwrap_or_default();
        if words.len() != documents.len() {
            return refuse("files and here-documents in one COPY or ADD are not supported here; write one instruction for each".to_owned());
        }
        let mut sources = String::new();
        for document in &documents {
            let name = &document.name;
            if name.starts_with(['.', '-']) || !name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
                return refuse(format!("a file cannot be called {name:?} by a here-document here; letters, digits, `_`, `-` and `.` will do"));
            }
            if !document.quoted && document.text.contains(['$', '\\']) {
                return refuse(format!(
                    "the here-document {name} of a COPY or ADD has a `$` or a backslash, and variables are not filled in there; \
                     write <<'{name}' if all of it is meant as it stands, or use RUN cat <<{name} >FILE"
                ));
            }
            let path = format!("{line}/{name}");
            sources.push_str(&format!(" {path}"));
            self.files.push((path, document.content()));
        }
        let flags = options.last().map_or(keyword_end, |flag| flag.span().end);
        // An edit of its own, for a flag may be left out in between. Only COPY knows --from.
        self.edits.push((at..keyword_end, "COPY".to_owned()));
        self.edits.push((flags..end, format!(" --from={FILES}{sources} {to}")));
        Ok(())
    }

    /// Takes a VOLUME from its place. One with a variable stays there in a stage that others are made from: its ARG may be
    /// unknown to them.
    fn move_volume(&mut self, at: usize) {
        let Some(Joined { command, end, .. }) = self.here.remove(&at) else { return };
        if !command.contains('$') || self.stages.len() == self.n_stages {
            self.edits.push((at..end, String::new()));
            let step = self.stage().steps.pop().expect("the step that is read has been added");
            self.stage().volumes.push((step, format!("\nVOLUME {command}")));
        }
    }

    /// The shell form becomes the exec form of the SHELL that was set.
    fn rewrite_command(&mut self, at: usize, keyword_end: usize) {
        let (Some(Joined { command, end, .. }), Some(mut words)) = (self.here.remove(&at), self.stage().shell.clone()) else { return };
        if !command.is_empty() {
            words.push(command);
            self.edits.push((keyword_end..end, format!(" {}", json_strings(&words))));
        }
    }

    /// `RUN <<NAME` becomes the exec form of the same script; where there is more on its line, the shell reads the documents.
    fn rewrite_script(&mut self, run: &parse_dockerfile::RunInstruction<'_>) {
        let Some(Joined { command, documents, end }) = self.here.remove(&run.run.span.start) else { return };
        let shell = self.stage().shell.clone();
        let default = || vec!["/bin/sh".to_owned(), "-c".to_owned()];
        let mut words = shell.unwrap_or_else(default);
        if here_documents::words(&command).len() == 1 {
            let script = documents.iter().map(here_documents::Document::content).collect::<String>();
            if script.starts_with("#!") {
                // A script with an interpreter of its own is run as a file; `$0` is its text.
                words = default();
                words.push(RUN_AS_FILE.to_owned());
            }
            words.push(script);
        } else {
            let bodies = documents.iter().map(|document| format!("{}{}\n", document.text, document.name));
            words.push(format!("{}\n{}", command.trim_end(), bodies.collect::<String>()));
        }
        let begin = run.options.last().map_or(run.run.span.end, |flag| flag.span().end);
        self.edits.push((begin..end, format!(" {}", json_strings(&words))));
    }
}

const RUN_AS_FILE: &str =
    r#"f=$(mktemp) && printf %s "$0" >"$f" && chmod 700 "$f" && "$f"; status=$?; rm -f "$f"; exit $status"#;

fn json_strings(words: &[String]) -> String {
    serde_json::Value::from(words).to_string()
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
