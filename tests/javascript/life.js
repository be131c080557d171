// The life of an image and a microVM by the AWS SDK for JavaScript, which was told nothing but the variables of `dormouse env`.
// Arguments: name of the image, URI of its zip. Prints what the SDK made of each answer, as JSON.
import {
  CreateMicrovmAuthTokenCommand, CreateMicrovmImageCommand, GetMicrovmCommand, GetMicrovmImageCommand, LambdaMicrovmsClient, ListMicrovmsCommand,
  ResourceNotFoundException, ResumeMicrovmCommand, RunMicrovmCommand, SuspendMicrovmCommand, TerminateMicrovmCommand, paginateListMicrovms,
} from "@aws-sdk/client-lambda-microvms";

const [name, uri] = process.argv.slice(2);
const client = new LambdaMicrovmsClient({});
const told = {};

// Asks until the answer says so; whoever runs this has a ceiling.
async function until(command, done) {
  for (;;) {
    const answer = await client.send(command);
    if (done(answer)) return answer;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

const region = await client.config.region();
told.created = await client.send(new CreateMicrovmImageCommand({
  name,
  codeArtifact: { uri },
  baseImageArn: `arn:aws:lambda:${region}:aws:microvm-image:al2023-1`,
  buildRoleArn: "arn:aws:iam::123456789012:role/MicroVMBuildRole",
  resources: [{ minimumMemoryInMiB: 512 }],
}));
const imageIdentifier = told.created.imageArn;
told.image = await until(new GetMicrovmImageCommand({ imageIdentifier }), (image) => image.state !== "CREATING");
told.ran = await client.send(new RunMicrovmCommand({
  imageIdentifier, idlePolicy: { maxIdleDurationSeconds: 300, suspendedDurationSeconds: 300, autoResumeEnabled: true },
}));
const microvmIdentifier = told.ran.microvmId;
const reaches = (state) => until(new GetMicrovmCommand({ microvmIdentifier }), (view) => view.state === state || view.state === "TERMINATED");
told.running = await reaches("RUNNING");
told.token = await client.send(new CreateMicrovmAuthTokenCommand({ microvmIdentifier, expirationInMinutes: 5, allowedPorts: [{ port: 8080 }] }));
await client.send(new SuspendMicrovmCommand({ microvmIdentifier }));
told.suspended = await reaches("SUSPENDED");
await client.send(new ResumeMicrovmCommand({ microvmIdentifier }));
told.resumed = await reaches("RUNNING");
told.listed = [];
for await (const page of paginateListMicrovms({ client, pageSize: 1 }, {})) told.listed.push(...page.items.map((item) => item.microvmId));
told.one = (await client.send(new ListMicrovmsCommand({ imageIdentifier }))).items;
await client.send(new TerminateMicrovmCommand({ microvmIdentifier }));
told.terminated = await reaches("TERMINATED");
try {
  await client.send(new GetMicrovmCommand({ microvmIdentifier: "microvm-00000000-0000-4000-8000-000000000000" }));
} catch (error) {
  told.refused = { known: error instanceof ResourceNotFoundException, name: error.name, status: error.$metadata.httpStatusCode, message: error.message };
}
console.log(JSON.stringify(told));
