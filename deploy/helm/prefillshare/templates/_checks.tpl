{{- /* Refuses at install what would otherwise show only at the first request, or as a pod or a replica that waits for ever.
values.schema.json refuses what can be told from one value alone. */ -}}
{{- define "prefillshare.check" -}}
{{- include "prefillshare.checkPlaces" . }}
{{- include "prefillshare.checkCapacity" . }}
{{- include "prefillshare.checkSecrets" . }}
{{- end }}

{{- define "prefillshare.checkPlaces" -}}
{{- $router := .Values.deployment.router | default dict }}
{{- if ne (get $router "host" | toString) "0.0.0.0" }}
{{- fail "deployment.router.host: give 0.0.0.0, because other pods call the routers" }}
{{- end }}
{{- if not (get $router "resources") }}
{{- fail "deployment.router.resources: name what a group offers, like router: 0.01; the Service finds routers by it" }}
{{- end }}
{{- if has 8080 (list (include "prefillshare.httpPort" . | int) (include "prefillshare.grpcPort" . | int)) }}
{{- fail "deployment.router: port 8080 is that of the metrics; choose another one" }}
{{- end }}
{{- if not (hasPrefix "/" .Values.deployment.base.model) }}
{{- fail (printf "deployment.base.model: %s is not an absolute path in the pods, like %s/base" .Values.deployment.base.model .Values.models.mountPath) }}
{{- end }}
{{- with .Values.models }}
{{- $given := compact (list .existingClaim .hostPath (ternary "download" "" (not (empty .download)))) }}
{{- if ne (len $given) 1 }}
{{- fail "models: give one of existingClaim, hostPath and download" }}
{{- end }}
{{- range $number, $one := .download }}
{{- if eq (empty $one.repo) (empty $one.url) }}
{{- fail (printf "models.download.%d: give repo or url" $number) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Compares the resources and GPUs that engines and routers take with what the groups offer. A pool of mode none has prefill engines
of its own, which are not counted. */ -}}
{{- define "prefillshare.checkCapacity" -}}
{{- $groups := list (dict "name" "head" "offers" .Values.head.rayResources "pods" 1 "gpus" 0) }}
{{- range $name, $group := .Values.workers }}
{{- if or (gt (int $group.minReplicas) (int $group.replicas)) (gt (int $group.replicas) (int $group.maxReplicas)) }}
{{- fail (printf "workers.%s: minReplicas <= replicas <= maxReplicas does not hold" $name) }}
{{- end }}
{{- $pods := ternary $group.maxReplicas $group.replicas $.Values.autoscaling.enabled }}
{{- $gpus := dig "count" 0 (get $group "gpus" | default dict) }}
{{- $groups = append $groups (dict "name" $name "offers" $group.rayResources "pods" $pods "gpus" $gpus) }}
{{- end }}

{{- $takers := list (dict "place" "router" "part" .Values.deployment.router "gpus" false) }}
{{- /* Without `prefill` there is a pool where some pool needs it: one of full weights, or of mode droidspeak. */ -}}
{{- $given := kindIs "map" .Values.deployment.prefill }}
{{- range $number, $pool := .Values.deployment.decode }}
{{- $takers = append $takers (dict "place" (printf "decode.%d" $number) "part" $pool "gpus" true) }}
{{- $sharing := get $pool "sharing" | default "prefillshare" }}
{{- if and (ne $sharing "none") (or $given (eq $sharing "droidspeak") (get $pool "model")) }}
{{- $takers = prepend $takers (dict "place" "prefill" "part" ($.Values.deployment.prefill | default dict) "gpus" true) }}
{{- end }}
{{- end }}

{{- $taken := dict }}
{{- $gpusTaken := 0.0 }}
{{- range $taker := uniq $takers }}
{{- $part := $taker.part }}
{{- $replicas := ternary (get $part "replicas") 1 (hasKey $part "replicas") }}
{{- with get $part "autoscale" }}{{ $replicas = .max_replicas }}{{ end }}
{{- $gpus := ternary (mulf (get $part "tensor_parallel_size" | default 1) (get $part "gpu_share" | default 1.0)) 0.0 $taker.gpus }}
{{- $gpusTaken = addf $gpusTaken (mulf $replicas $gpus) }}
{{- range $name, $amount := get $part "resources" | default dict }}
{{- $_ := set $taken $name (addf (get $taken $name | default 0.0) (mulf $replicas $amount)) }}
{{- $offered := 0.0 }}
{{- $fits := false }}
{{- range $group := $groups }}
{{- if hasKey $group.offers $name }}
{{- $of := get $group.offers $name }}
{{- $offered = addf $offered (mulf $group.pods $of) }}
{{- $fits = or $fits (and (le (float64 $amount) (float64 $of)) (or (eq (int $group.gpus) 0) (le (float64 $gpus) (float64 $group.gpus)))) }}
{{- end }}
{{- end }}
{{- if not $offered }}
{{- fail (printf "deployment.%s.resources: no group offers %s (rayResources of head and workers)" $taker.place $name) }}
{{- end }}
{{- if not $fits }}
{{- fail (printf "deployment.%s: a replica takes %v %s and %v GPUs, but no pod of a group has them" $taker.place $amount $name $gpus) }}
{{- end }}
{{- if gt (float64 (get $taken $name)) (float64 $offered) }}
{{- fail (printf "deployment.%s: with its replicas, %v %s are taken in all, but the groups offer %v (rayResources times pods)" $taker.place (get $taken $name) $name $offered) }}
{{- end }}
{{- end }}
{{- end }}
{{- $gpus := 0 }}
{{- range $groups }}{{ $gpus = add $gpus (mul .pods .gpus) }}{{ end }}
{{- if and (gt (int $gpus) 0) (gt (float64 $gpusTaken) (float64 $gpus)) }}
{{- fail (printf "deployment: its engines take %v GPUs, but the groups have %d (workers.GROUP.gpus.count times pods)" $gpusTaken $gpus) }}
{{- end }}
{{- end }}

{{- /* Refuses a secret that is mounted but not used, or used but not mounted. */ -}}
{{- define "prefillshare.checkSecrets" -}}
{{- $router := .Values.deployment.router }}
{{- $keys := ternary "/etc/prefillshare/keys/keys.yaml" "" (not (empty .Values.auth.keysFile.secretName)) }}
{{- if ne (dig "keys_file" "" (get $router "auth" | default dict)) $keys }}
{{- fail (printf "deployment.router.auth.keys_file: auth.keysFile mounts %s" ($keys | default "no keys file")) }}
{{- end }}
{{- $tls := get $router "tls" | default dict }}
{{- $secret := .Values.tls }}
{{- range $field, $key := dict "cert_file" $secret.certKey "key_file" $secret.keyKey "client_ca_file" $secret.clientCaKey }}
{{- $file := ternary (printf "/etc/prefillshare/tls/%s" $key) "" (and $secret.secretName $key | empty | not) }}
{{- if ne (get $tls $field | default "") $file }}
{{- fail (printf "deployment.router.tls.%s: tls mounts %s, and both have to name the same file" $field ($file | default "no such file")) }}
{{- end }}
{{- end }}
{{- if and .Values.redis.password.secretName (not (get $router "redis_password_env")) }}
{{- fail "deployment.router.redis_password_env: name the environment variable that redis.password is put into" }}
{{- end }}
{{- end }}
